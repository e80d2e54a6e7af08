"""Makes ``corpus/``: small valid files, and files that were once read badly or are made to harm.

Run ``python benchmarks/fuzz/seeds.py`` after a change here; tests compare the folder with what
this writes. What fuzzing finds is added to :func:`regressions` by hand, as small as it gets.
"""

from __future__ import annotations

import json
import pickle
import struct
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from targets import chunk, file_of  # noqa: E402

Seeds = dict[str, dict[str, bytes]]


def dumps(value: Any) -> bytes:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":")).encode()


def seeds() -> Seeds:
    """Target -> name -> bytes."""
    return {target: cases | regressions().get(target, {}) for target, cases in valid().items()}


@cache
def valid() -> Seeds:
    """Files as programs write them."""
    one = {"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}
    two = one | {"b": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]}}
    texts = dumps({"__metadata__": {"format": "pt"}} | two)
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    return {
        "header": {
            "one": b"\x08\x00" + dumps(one),
            "two": b"\x0a\x00" + texts + b"  ",
            "empty": b"\x00\x00{}",
        },
        "whole": {"two": struct.pack("<Q", len(texts)) + texts + bytes(10)},
        "index": {
            "plain": dumps(
                {
                    "metadata": {"total_size": 16},
                    "weight_map": {
                        "b": "model-00001-of-00002.safetensors",
                        "1": "model-00001-of-00002.safetensors",
                        "c": "model-00002-of-00002.safetensors",
                        "2": "model-00002-of-00002.safetensors",
                    },
                }
            ),
        },
        "config": {
            "tied": dumps(
                {
                    "architectures": ["LlamaForCausalLM"],
                    "model_type": "llama",
                    "tie_word_embeddings": True,
                    "text_config": {"hidden_size": 8},
                }
            ),
            "quantized": dumps({"quantization_config": {"quant_method": "gptq"}}),
        },
        "tokenizer": {
            "fast": dumps(
                {
                    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}},
                    "added_tokens": [{"id": 2, "content": "<s>"}],
                }
            ),
            "unigram": dumps({"model": {"vocab": [["a", 0.0], ["b", -1.5]]}}),
            "table": b"\1" + dumps({"a": 0, "b": 1}),
            "lines": b"\2a\nb\r\nc",
        },
        "adapter": {
            "lora": b"\0"
            + dumps(lora | {"rank_pattern": {"q": 2}, "alpha_pattern": {r".*\.q": 8}}),
            "rslora": b"\0" + dumps(lora | {"use_rslora": True, "modules_to_save": ["head"]}),
            "ia3": b"\1" + dumps({"peft_type": "IA3", "feedforward_modules": ["q"]}),
            "oft": b"\2" + dumps({"peft_type": "OFT", "use_cayley_neumann": True, "r": 2}),
            "lokr": b"\3" + dumps({"peft_type": "LOKR", "r": 2, "alpha": 4}),
            "adalora": b"\4" + dumps({"peft_type": "ADALORA", "lora_alpha": 4, "init_r": 2}),
            "miss": b"\5" + dumps({"peft_type": "MISS", "r": 2, "init_weights": True}),
            "hra": b"\6" + dumps({"peft_type": "HRA", "r": 2, "apply_GS": False}),
            "dora": b"\7" + dumps(lora | {"use_dora": True}),
        },
        "keys": {
            "peft": b"base_model.model.a.0.q.lora_A.weight\nbase_model.model.a.0.q.lora_B.weight",
            "kohya": b"lora_unet_a_b.lora_down.weight\nlora_unet_a_b.lora_up.weight",
            "lycoris": b"lora_unet_a.hada_w1_a\nlora_unet_a.hada_w1_b\nlora_unet_a.hada_w2_a\n"
            b"lora_unet_a.hada_w2_b",
            "model": b"model.layers.0.q.weight\nmodel.layers.1.q.weight\nlm_head.weight",
        },
        "metadata": {
            "delta": dumps({"kind": "delta", "version": 1, "base": None, "replaced": []}),
            "replaced": dumps(
                {
                    "kind": "delta",
                    "version": 1,
                    "base": {"fingerprint": "0"},
                    "replaced": ["a.weight"],
                }
            ),
            "manifest": dumps({"mergebench": "0.1.0", "recipe": {"method": "ties"}, "inputs": []}),
            "diffusers": b"\1" + dumps({"unet.r": 2, "unet.lora_alpha": 2}),
            "config": b"\2" + dumps(lora),
        },
        "manifest": {
            "plain": dumps({"mergebench": "0.1.0", "recipe": {"method": "ties"}, "outputs": {}})
        },
        "made": {"plain": made_manifest()},
        "recipe": {
            "yaml": b"mergebench: 1\nmethod: ties\nparams:\n  density: [0.2, 0.5]\n  lam: 0..1\n"
            b"models:\n- path: a\n  weight: 0.5\n- b\nbase: base\nthen:\n- trim: {density: 0.1}\n",
            "json": dumps({"models": ["a", "b"], "ops": ["sum", {"scale": {"factor": 2}}]}),
            "rules": b"models: [a, b]\nmethod: linear\nwhere: 'class=norm:lam=0,weight=1/0'\n"
            b"params: {lam: {cases: [{select: block=0-3, value: 2}], else: 1}}\n",
            "line-end": b'{"models":["a\\u0085b"],"base":"\\u2028"}',
            "anchor": b"models:\n- &a {path: a, weight: 1}\n- {<<: *a, path: b}\n",
            "parts": b"models: [a, {path: b, params: {density: 0.5}}]\nmethod: ties\nparts:\n"
            b"- {select: class=norm, method: linear, weights: [1, 0..1]}\n"
            b"- 'mlp:ties:density=0.3'\n"
            b"- select: {include: [a, b], exclude: block=0}\n  ops: [weigh, sum]\n"
            b"  then: {scale: {lam: 2}}\n",
            "slices": b"models:\n- slices: [{path: a, blocks: 0-3}, {path: b, blocks: 2}]\n"
            b"base: {slices: [{path: c, blocks: 0-4}]}\nchat_template: auto\n",
        },
        "mergekit": {
            "models": b"merge_method: ties\nbase_model: x\nmodels:\n- model: a\n  parameters:\n"
            b"    weight: [0, 0.5, 1]\n    density: [{filter: mlp, value: 0.5}, {value: 1}]\n"
            b"- {model: b, parameters: {weight: 1}}\nparameters: {normalize: true}\n"
            b"dtype: bfloat16\ntokenizer_source: union\n",
            "slices": b"merge_method: passthrough\nslices:\n"
            b"- sources: [{model: a, layer_range: [0, 2]}]\n"
            b"- sources: [{model: b, layer_range: [1, 3], parameters: {scale: [0, 1]}}]\n",
            "json": dumps(
                {
                    "merge_method": "slerp",
                    "base_model": {"model": {"path": "x"}, "lora": {"path": "l"}},
                    "models": [{"model": "a+l"}],
                    "parameters": {"t": [{"filter": "attn", "value": [0, 1]}, {"value": 0.5}]},
                    "tokenizer": {"source": "base"},
                    "chat_template": "chatml",
                }
            ),
        },
        "journal": {
            "two": b"\1"
            + dumps({"journal": 1, "key": "k", "place": 7})
            + b"\n"
            + dumps({"finished": {"a": "00"}})
            + b"\n"
            + dumps({"settled": {"t": 0.5}}),
        },
        "gguf": {"plain": gguf_file(), "array": gguf_file(array=True)},
        "pickled": {
            "state": b"\0" + pickle_of({"a": (2, 2)}),
            "wrapped": b"\0" + pickle_of({"state_dict": {"a": (2, 2)}, "epoch": 3}),
            "legacy": b"\1" + torch_file({"a": (2, 2)}, zipped=False),
        },
        "sparse": {
            "plain": sparse_pickle([b"K\2", b"K\3"]),
            "numpy": sparse_pickle(
                [
                    (
                        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\nX\2\0\0\0i8K\0K\1\x87R"
                        b"(K\3X\1\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
                        b"c_codecs\nencode\nX\x08\0\0\0\2\0\0\0\0\0\0\0X\6\0\0\0latin1\x86RtR"
                    ),
                    b"K\3",
                ]
            ),
        },
        "archive": {"torch": torch_file({"a": (2, 2)}, zipped=True)},
        "dcp": {"plain": dcp_metadata(len(chunk()))},
        "packed": {
            "ternary": packed_tensor("ternary", (3, 700), 10),
            "dense": packed_tensor("ternary", (300,), 2),
            "short": packed_tensor("ternary", (), 1),
            "one-bit": packed_tensor("one_bit", (60,), 3),
            "two-bit": packed_tensor("two_bit", (300,), 3),
            "sparse": packed_tensor("sparse", (40, 40), 20),
            "raw": packed_tensor("raw", (5,), 2),
        },
    }


def regressions() -> Seeds:
    """What was once read badly, or is made to harm; refused, but for what is in ``TAKEN``."""
    deep, digits = b"[" * 3000 + b"]" * 3000, b"9" * 5000
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    bomb = b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
        b"a%d: &a%d [%s]\n" % (at, at, b", ".join([b"*a%d" % (at - 1)] * 10)) for at in range(1, 9)
    )
    merges = b"a0: &a0 {x: 1, y: 2}\n" + b"".join(
        b"a%d: &a%d {<<: [%s], z%d: 1}\n" % (at, at, b", ".join([b"*a%d" % (at - 1)] * 9), at)
        for at in range(1, 9)
    )
    two = b"models: [a, b]\n"
    values = ", ".join(map(str, range(1, 60))).encode()
    return {
        "header": {
            "deep": b"\0\0" + deep,
            "digits": b'\0\0{"a":{"dtype":"U8","shape":[' + digits + b'],"data_offsets":[0,0]}}',
            "twice": b'\0\0{"a":1,"a":1}',
            "surrogate": b'\0\0{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
            "escapes": b'\0\0{"\\u001b[2J":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
            "wraps": b"\0\0"
            + dumps({"a": {"dtype": "F64", "shape": [2**61], "data_offsets": [0, 0]}}),
        },
        "index": {
            "deep": b'{"weight_map":' + deep + b"}",
            "outside": dumps({"weight_map": {"b": "../../../etc/passwd"}}),
            "absolute": dumps({"weight_map": {"b": "/etc/passwd"}}),
            "nul": dumps({"weight_map": {"b": "a\0.safetensors"}}),
            "long": dumps({"weight_map": {"b": "a" * 3000 + ".safetensors"}}),
            "list": dumps({"weight_map": [["b", "a"]]}),
        },
        "config": {
            "deep": b'{"a":' + deep + b"}",
            "digits": b'{"vocab_size":' + digits + b"}",
            "surrogate": b'{"model_type":"\\ud800"}',
            "architectures": b'{"architectures":1}',
            "escapes": dumps({"model_type": "\x1b[2J\x07"}),
        },
        "tokenizer": {
            "added": b'{"model":{"vocab":{}},"added_tokens":1}',
            "deep": b'{"model":' + deep + b"}",
            "row": b'{"model":{"vocab":{"a":' + digits + b"}}}",
            "far": b'\1{"a":9223372036854775808}',
        },
        "adapter": {
            "type": b'\0{"peft_type":["LORA"]}',
            "base": b"\0" + dumps(lora | {"base_model_name_or_path": ["a"]}),
            "deep": b'\0{"peft_type":"LORA","r":' + deep + b"}",
            "digits": b'\0{"peft_type":"LORA","r":' + digits + b"}",
            "pattern": b"\0" + dumps(lora | {"rank_pattern": {"(l+a+y+e+r*s*|.*.*)+x": 4}}),
            "pattern-size": b"\0" + dumps(lora | {"alpha_pattern": {"(a*){1000}b*": 4}}),
            "pattern-look": b"\0" + dumps(lora | {"alpha_pattern": {"(?=(a*)*)b*": 4}}),
            "rank": b"\3" + dumps({"peft_type": "LOKR", "r": 0.5, "alpha": 4}),
            "init": b"\4" + dumps({"peft_type": "ADALORA", "lora_alpha": 4, "init_r": -1e-5}),
        },
        "keys": {
            "dots": b"a." * 200 + b"weight",
            "long": b"a" * 3000,
            "block": b"layers." + b"9" * 900 + b".q.weight",
            "escapes": b"\x1b]0;owned\x07.weight\n\xe2\x80\xaeright.weight",
        },
        "metadata": {
            "deep": deep,
            "digits": digits,
            "number": b'{"kind":"delta","version":1,"replaced":1}',
            "objects": b'{"kind":"delta","version":1,"replaced":[{}]}',
            "type": b'\2{"peft_type":{}}',
            "recipe": b'{"recipe":"ties"}',
        },
        "manifest": {
            "deep": b'{"recipe":' + deep + b"}",
            "text": b'{"recipe":"ties","mergebench":[]}',
        },
        "made": {
            "deep": b'{"recipe":' + deep + b"}",
            "long": made_manifest().replace(b'"model.safetensors"', b'"' + b"a" * 3000 + b'"'),
        },
        "recipe": {
            "aliases": bomb + b"models: *a8\n",
            "merges": merges,
            "itself": b"models: &a [*a]\n",
            "deep": deep,
            "twice": two + b"method: ties\nmethod: linear\n",
            "ops": two + b"ops: 1\n",
            "ops-none": two + b"ops: 0\n",
            "op-name": two + b"then: [{'a:b': null}]\n",
            "op": two + b"then: 'trim:density'\n",
            "tag": two + b"base: !!python/object/apply:os.system ['true']\n",
            "bool": two + b"ignore_saved_base: !!bool maybe\n",
            "time": two + b"base: !!timestamp soon\n",
            "int": two + b"lora_alpha: !!int ''\n",
            "set": two + b"params: {lam: !!set {1}}\n",
            "digits": two + b"params: {lam: " + digits + b"}\n",
            "hex": two + b"params: {lam: 0x" + b"f" * 5000 + b"}\n",
            "surrogate": b'{"models":["\\ud800"]}',
            "sweep": two + b"params: {a: [%s], b: [%s]}\n" % (values, values),
            "sweep-none": two + b"params: {a: []}\n",
            "list": two + b"where: 'class=norm:lam=0'\nparams: {lam: [[]]}\n",
            "block": two + b"where: 'block=" + digits + b":lam=1'\n",
        },
        "journal": {
            "deep": b"\1" + deep,
            "digits": b'\1{"journal":1,"key":"k","place":' + digits + b"}",
            "list": b'\1{"journal":1,"key":"k","place":1}\n[]',
            "no-checksum": b'\0{"journal":1,"key":"k","place":1}\n',
        },
        "gguf": {
            "count": struct.pack("<IQQ", 3, 2**63, 2**64 - 1) + bytes(64),
            "empty": struct.pack("<IQQ", 3, 1, 0)
            + struct.pack("<Q1sIQQIQ", 1, b"w", 2, 2**63, 0, 0, 0)
            + bytes(64),
            "text": struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(64),
            "nested": struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 9)
            + struct.pack("<IQ", 9, 1) * 5000
            + bytes(64),
        },
        "pickled": {
            "tuples": b"\0\x80\x02}(K\0\x85q\0" + b"0h\0h\0\x86q\0" * 60 + b"K\1u.",
            "nested": b"\0\x80\x02}(K\0" + b"\x85" * 20_000 + b"K\1u.",
            "nested-lists": b"\0" + nested_lists(),
            "bytearray": b"\0\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
            "punycode": b"\0\x80\x02c_codecs\nencode\nX\2\0\0\0\xc3\xa9X\x08\0\0\0punycode\x86R.",
            "name": b"\0\x80\x02X\3\0\0\0a\nbX\1\0\0\0c\x93.",
            "text": b"\1\x80\x02X\xff\xff\xff\x7fa.",
        },
        "sparse": {
            "far": sparse_pickle([b"K\2", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"]),
            "twice": sparse_pickle([b"K\2", b"K\0"]),
            "size": sparse_pickle([b"K\2", b"K\3"], size=b"\x8a\x09" + b"\xff" * 8 + b"\0"),
            "numbers": sparse_pickle([b"K\2", b"K\3"], count=b"J\xff\xff\xff\x7f"),
            "strides": sparse_pickle([b"K\2", b"K\3"], stride=b"J\xff\xff\xff\x7f"),
            "calls": b"\x80\2}X\5\0\0\0diffscposix\nsystem\nX\2\0\0\0id\x85Rs.",
            "tuples": b"\x80\x02}(K\0\x85q\0" + b"0h\0h\0\x86q\0" * 60 + b"K\1u.",
        },
        "archive": {
            "bomb": zipped({"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(4 << 20)}, packed=True),
            "bomb-pickle": zipped({"a/data.pkl": b"\x80\x02" + bytes(4 << 20)}, packed=True),
            "outside": zipped({"../../a/data.pkl": b"\x80\x02}.", "/a/data/0": b""}),
            "escapes": zipped({"\x1b[2J": b""}),
        },
        "dcp": {
            "memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
            "class": b"\x80\x04c%s\nMetadata\n}X\4\0\0\0nameK\1sb." % DCP,
            "keys": b"\x80\x04c%s\nMetadataIndex\n)\x81\x94}X\3\0\0\0fqnh\0h\0\x86sb." % DCP,
            "paths": b"\x80\x04cpathlib\nPosixPath\nX\1\0\0\0a\x85R\x94"
            + b"".join(b"cpathlib\nPosixPath\nh%ch%c\x86R\x94" % (at, at) for at in range(40))
            + b".",
        },
        "packed": {
            "bomb": struct.pack("<4s4BQ2f", b"TERN", 13, 0, 1, 2, 1 << 60, 0, 1) + bytes(8),
            "overflow": struct.pack("<4s4B2Q2f", b"TERN", 13, 0, 2, 2, 1 << 63, 2, 0, 1) + bytes(8),
            "streams": packed_tensor("ternary", (3, 700), 10, ((56, b"\xff" * 8),)),
            "class": packed_tensor("ternary", (3, 700), 10, ((52, b"\x7f"),)),
            "table": packed_tensor("ternary", (3, 700), 10, ((40, b"\xff" * 4),)),
            "dtype": packed_tensor("sparse", (40, 40), 20, ((5, b"\0"),)),
            "infinite": packed_tensor("ternary", (3, 700), 10, ((24, b"\0\0\x80\x7f"),)),
        },
    }


#: What is made to harm and is read nonetheless, since nothing is wrong with it.
TAKEN = {
    ("header", "escapes"),
    ("config", "architectures"),
    ("config", "escapes"),
    ("keys", "block"),
    ("keys", "escapes"),
    ("metadata", "deep"),
    ("metadata", "digits"),
    ("metadata", "recipe"),
    ("manifest", "deep"),
    ("manifest", "text"),
    ("adapter", "pattern"),
    ("journal", "list"),
    ("pickled", "nested-lists"),
}
DCP = b"torch.distributed.checkpoint.metadata"


def made_manifest() -> bytes:
    """What ``mergebench merge`` would have written beside the model of the target."""
    import xxhash

    file = file_of({"a.weight": [2, 2]})
    digest = xxhash.xxh3_128_hexdigest
    whole = {
        "version": 1,
        "kind": "model",
        "mergebench": "0.1.0",
        "recipe": {"mergebench": 1, "method": "linear", "models": [{"path": "a", "weight": 1.0}]},
        "inputs": [{"role": "model", "path": "a", "weight": 1.0, "fingerprint": "0", "files": []}],
        "notes": [],
        "outputs": {"a.weight": digest(file[-16:])},
        "tensors": {"a.weight": {"dtype": "F32", "shape": [2, 2], "file": "model.safetensors"}},
        "files": {"model.safetensors": {"bytes": len(file), "header": digest(file[:-16])}},
        "beside": {"config.json": digest(b"{}")},
        "digest": "0" * 32,
    }
    text = (json.dumps(whole, indent=1) + "\n").encode()
    end = text.rindex(b"0" * 32)
    return text[:end] + digest(text).encode() + text[end + 32 :]


def nested_lists() -> bytes:
    """A state dict beside a list that lies ten thousand lists deep."""
    state = pickle_of({"a": (2, 2)})
    lists = b"X\4\0\0\0deep" + b"]" * 10_000 + b"a" * 9_999 + b"s."
    return state[:-1] + lists


def zipped(records: Mapping[str, bytes], *, packed: bool = False) -> bytes:
    """A zip archive of these records, always the same bytes."""
    raw = BytesIO()
    with ZipFile(raw, "w") as archive:
        for name, data in records.items():
            about = ZipInfo(name)
            about.compress_type = ZIP_DEFLATED if packed else ZIP_STORED
            archive.writestr(about, data)
    return raw.getvalue()


def sparse_pickle(
    steps: Sequence[bytes], *, size: bytes = b"K\3", count: bytes = b"", stride: bytes = b"K\1"
) -> bytes:
    """``{"diffs": {"w": …}}`` with a tensor of 2 x ``size``, from instructions for the steps."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    many = count or b"K" + bytes([len(steps)])
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + many
    values = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQK\0" + many + b"\x85" + stride
    values += b"\x85\x89ccollections\nOrderedDict\n)RtR"
    shape = b"ctorch\nSize\n(K\2" + size + b"t\x85R"
    entry = b"}(" + text("size") + shape + text("index_steps") + b"](" + b"".join(steps) + b"e"
    entry += text("values") + values + b"u"
    return b"\x80\2}" + text("diffs") + b"}" + text("w") + entry + b"ss."


def packed_tensor(
    codec: str, shape: Sequence[int], every: int, changes: Sequence[tuple[int, bytes]] = ()
) -> bytes:
    """A packed tensor whose every n-th entry is set, with some bytes changed."""
    import numpy as np

    from mergebench.adapters_zoo.packing import CODECS, ROW, Head, blocks_of, head_bytes, pack_block

    places = np.arange(int(np.prod(shape)))
    # Not in step, so that planes are coded.
    coded = (places * 7919 % 1009 % every == 0) * np.where(places % 3 == 0, -1, 1)
    if codec in ("one_bit", "two_bit"):
        coded = np.where(coded == 0, 1, 2 * coded if codec == "two_bit" else -1)
    coded = coded.astype(np.float32 if codec in ("sparse", "raw") else np.int8)
    stored = "F32" if codec == "sparse" else "BOOL"
    head = Head(codec, "F32", tuple(shape), (1.0,) * CODECS[codec].numbers, stored)
    made = [pack_block(codec, coded[start:stop]) for start, stop in blocks_of(coded.size)]
    table = np.array([row for _, row in made], ROW)
    raw = bytearray(head_bytes("a.weight", head, table) + b"".join(data for data, _ in made))
    for at, data in changes:
        raw[at : at + len(data)] = data
    return bytes(raw)


def gguf_file(*, array: bool = False) -> bytes:
    """Everything behind the magic of a GGUF file with one field and one tensor."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    field = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    if array:
        field = text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    tensor = text("w") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    start = struct.pack("<IQQ", 3, 1, 1) + field + tensor
    return start + bytes(-(len(start) + 4) % 32) + bytes(32)


def torch_file(state: Mapping[str, Any], *, zipped: bool) -> bytes:
    """What ``torch.save`` writes."""
    import torch

    raw = BytesIO()
    torch.save(_tensors(state), raw, _use_new_zipfile_serialization=zipped)
    return raw.getvalue()


def pickle_of(state: Mapping[str, Any]) -> bytes:
    """The record ``data.pkl`` of what ``torch.save`` writes."""
    with ZipFile(BytesIO(torch_file(state, zipped=True))) as archive:
        return archive.read("archive/data.pkl")


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    return {
        key: _tensors(value)
        if isinstance(value, dict)
        else torch.ones(value)
        if isinstance(value, tuple)
        else value
        for key, value in state.items()
    }


def dcp_metadata(size: int) -> bytes:
    """``.metadata`` of one small tensor in a chunk of ``size`` bytes."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    start, shape = torch.Size([0, 0]), torch.Size([2, 2])
    entry = TensorStorageMetadata(
        TensorProperties(torch.float32), shape, [ChunkStorageMetadata(start, shape)]
    )
    place = {MetadataIndex("a", start): _StorageInfo("__0_0.distcp", 0, size)}
    return pickle.dumps(Metadata({"a": entry}, {"a": ("a",)}, place), 4)


def write(folder: Path) -> None:
    """Write every seed as ``folder/target/name``."""
    for target, cases in seeds().items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for name, data in cases.items():
            (folder / target / name).write_bytes(data)


if __name__ == "__main__":
    write(HERE / "corpus")
    sys.stdout.write(f"{sum(map(len, seeds().values()))} seeds\n")
