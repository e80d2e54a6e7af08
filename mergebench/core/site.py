"""Where in the model a tensor lives: the only context that an op sees."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

from mergebench.core.errors import ParameterError
from mergebench.core.regular import check_ways

#: Finds the stack and the index of a numbered block in a tensor name. Overridable per merge.
BLOCK_PATTERN = re.compile(
    r"^(?P<stack>(?:.*?\.)??(?:\w+_)?(?:layers?|blocks?|resblocks|stages|h))\.(?P<index>\d+)\."
)
#: Groups that a pattern for blocks must have.
_GROUPS = {"stack", "index"}
#: What a tensor can be; see :attr:`Site.kind`.
CLASSES = ("embedding", "head", "norm", "bias", "linear", "conv", "buffer")
#: The first that matches wins: norms stand inside embeddings, and GPT-NeoX's head is ``embed_out``.
_CLASSES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"(?i)(norm|ln_|(^|\.)ln\d*(\.|$))")),
    ("head", re.compile(r"(?i)(^|\.)(lm_head|score|classifier|head|embed_out|cls)(\.|$)")),
    (
        "embedding",
        re.compile(r"(?i)(embed|wte|wpe|embd|cls_token|class_token|(^|\.)shared\.weight$)"),
    ),
)
#: GPT-2's causal mask is called a bias, and has four dimensions; GPT-NeoX's and GPT-J's too.
_MASK = re.compile(r"(^|\.)(attn|attention|self_attention)\.(bias|masked_bias)$")
_BEFORE = re.compile(
    r"(?i)(embed|wte|wpe|embd|cls_token|class_token|(^|\.)shared\.|patch|ln_pre|pre_laye?rnorm)"
)
_CONSTANT = re.compile(
    r"(^|[._])((original_)?inv_freq|(cos|sin)_cached|position_ids|token_type_ids|causal_mask"
    r"|relative_position_index|_float_tensor)$"
)
#: Models whose linear layers are transformers' ``Conv1D``, which stores input × output.
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")


@dataclass(frozen=True)
class Site:
    """One tensor of the model, as ops see it.

    Attributes
    ----------
    name : str
        Tensor name, as in the base (or in the adapter, where there is no base).
    shape : tuple of int
        Stored shape.
    stack, block : str, int or None
        The numbered container the tensor belongs to (``"model.layers"``) and its index there;
        ``None`` outside of numbered blocks.
    depth : float or None
        ``block / (L - 1)`` within its stack of L blocks, so 0 for the first and 1 for the last;
        1 where L = 1; ``None`` outside of numbered blocks.
    kind : str
        ``embedding``, ``head``, ``norm``, ``bias``, ``linear``, ``conv`` or ``buffer``.
    transposed : bool
        True where a 2-D weight is stored input × output (GPT-2's ``Conv1D``).
    layers : int
        L; 0 outside of numbered blocks.
    beside : tuple of str
        Names of all tensors of its block, itself included, in the order of their bytes; empty
        outside of numbered blocks.
    """

    name: str
    shape: tuple[int, ...]
    stack: str = ""
    block: int | None = None
    depth: float | None = None
    kind: str = "linear"
    transposed: bool = False
    layers: int = field(default=0, compare=False, repr=False)
    beside: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def row(self) -> int:
        """Length of a row: the last dimension; 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def key(self) -> int:
        """64 bits derived from the name alone, for counter-based randomness."""
        return key_of(self.name)


def key_of(text: str) -> int:
    """64 bits derived from a text, for counter-based randomness."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_statistic(name: str) -> bool:
    """Whether a tensor is an estimate over data: BatchNorm's running mean and variance."""
    return name.rsplit(".", 1)[-1].startswith("running_")


def is_counter(name: str) -> bool:
    """Whether a tensor counts steps of training."""
    return name.rsplit(".", 1)[-1].startswith("num_batches")


def is_constant(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor follows from the config: masks, positions, rotary frequencies.

    Newer libraries compute them rather than save them.
    """
    if _MASK.search(name):
        return len(shape) in (0, 4) or name.endswith("masked_bias")
    return bool(_CONSTANT.search(name))


def stands_before(name: str) -> bool:
    """Whether a tensor outside of blocks feeds them (embeddings, their norms), or follows them."""
    return bool(_BEFORE.search(name)) and not _CLASSES[1][1].search(name)


@lru_cache(1 << 16)
def kind_of(name: str, shape: tuple[int, ...], floating: bool = True) -> str:
    """The class of a tensor, from its name and its number of dimensions."""
    if not floating or is_statistic(name) or is_counter(name) or is_constant(name, shape):
        return "buffer"
    for kind, pattern in _CLASSES:
        if pattern.search(name):
            return kind
    if name.endswith("bias"):
        return "bias"
    return {2: "linear"}.get(len(shape), "conv" if len(shape) > 2 else "bias")


def conv1d_names(names: Iterable[str], model_type: str | None) -> list[str]:
    """The weights that a type of model (``model_type`` of its config) stores input × output."""
    if model_type not in _CONV1D_MODELS:
        return []
    return [name for name in names if _CONV1D.search(name)]


def parse_pattern(text: str | None) -> re.Pattern[str]:
    r"""A pattern for numbered blocks as users write it; the usual one for ``None``.

    Parameters
    ----------
    text : str or None
        A regular expression with the groups ``stack`` (what is numbered, ``model.layers``) and
        ``index`` (digits), searched for in tensor names, such as
        ``(?P<stack>transformer)\.(?P<index>\d+)\.``.

    Raises
    ------
    ParameterError
        If it is no regular expression, could take too long, or lacks one of the groups.
    """
    if text is None:
        return BLOCK_PATTERN
    wanted = r"a regular expression such as (?P<stack>blocks)\.(?P<index>\d+)\."
    try:
        pattern = re.compile(text)
        check_ways(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ParameterError(
            f"block pattern: no regular expression that can be used ({error})",
            got=text,
            expected=wanted,
        ) from None
    if missing := _GROUPS - set(pattern.groupindex):
        raise ParameterError(
            f"block pattern: has no group {min(missing)!r}", got=text, expected=wanted
        )
    return pattern


def make_sites(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    pattern: re.Pattern[str] = BLOCK_PATTERN,
    transposed: Iterable[str] = (),
) -> dict[str, Site]:
    """Sites of all tensors of a model, depth counted separately in every stack.

    Parameters
    ----------
    shapes : mapping of name to shape
        Every tensor that takes part.
    pattern : compiled regular expression
        Searched for in names; must have the groups ``stack`` and ``index``.
    transposed : names
        Weights stored input × output.

    Raises
    ------
    ParameterError
        If the pattern finds something that is no number.
    """
    found: dict[str, tuple[str, int]] = {}
    length: dict[str, int] = {}
    for name in shapes:
        if match := pattern.search(name):
            stack, index = match["stack"] or "", _number(match["index"], name)
            found[name] = stack, index
            length[stack] = max(length.get(stack, 0), index + 1)
    blocks: dict[tuple[str, int], list[str]] = {}
    for name in sorted(found, key=str.encode):
        blocks.setdefault(found[name], []).append(name)
    beside = {place: tuple(names) for place, names in blocks.items()}
    flipped = frozenset(transposed)
    sites = {}
    for name, shape in shapes.items():
        here, block = found.get(name, ("", None))
        depth = None
        if block is not None:
            depth = block / (length[here] - 1) if length[here] > 1 else 1.0
        sites[name] = Site(
            name=name,
            shape=tuple(shape),
            stack=here,
            block=block,
            depth=depth,
            kind=kind_of(name, shape),
            transposed=name in flipped,
            layers=length.get(here, 0) if block is not None else 0,
            beside=beside[found[name]] if block is not None else (),
        )
    return sites


def _number(text: str | None, name: str) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise ParameterError(
            f"block pattern: finds {text!r} in {name!r} for the index",
            expected="digits",
            fix=r"let the group be (?P<index>\d+)",
        ) from None
