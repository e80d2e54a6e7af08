"""``inspect``, ``diff`` and ``methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro
from mergebench.core.errors import EXIT_FINDINGS

if TYPE_CHECKING:
    from mergebench.core.params import Param
    from mergebench.sources import Source


def _open(
    reference: str, base: str | None, lora_alpha: float | None, cache: str = "keep"
) -> Source:
    from mergebench.adapters_zoo.adapter import ReadOptions
    from mergebench.sources.opening import open_source, with_base

    options = ReadOptions(lora_alpha=lora_alpha, stream=mo.streams(cache))
    if base is not None and (under := open_source(base, options).checkpoint) is not None:
        options = with_base(options, under)
    return open_source(reference, options)


def inspect(
    model: Annotated[str, typer.Argument(help="What to look at.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", "-t", help="List every tensor.")] = False,
    base: o.Base = None,
    lora_alpha: ro.LoraAlpha = None,
    cache: mo.Cache = "keep",
    as_json: o.Json = False,
) -> None:
    """Say what a checkpoint, an adapter or a task vector is, from its headers.

    Examples:

    \b
      mergebench inspect merged
      mergebench inspect adapter --tensors
    """
    data = _described(model, base, lora_alpha, cache, tensors=tensors)
    if as_json:
        console.say_json(data)
        return
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    update = data.pop("update", {})
    listed = data.pop("tensor_list", [])
    made = data.pop("made_by", None)
    for key, value in {**data, **update}.items():
        if value not in ([], {}, None, ""):
            table.add_row(key.replace("_", " "), console.cell(_words(key, value)))
    if made and isinstance(made["recipe"], dict):
        how = made["recipe"].get("method") or "a chain of ops"
        table.add_row("made by", console.cell(f"mergebench {made['mergebench']}, {how}"))
    console.out().print(table)
    if listed:
        rows = Table(box=None, pad_edge=False)
        for heading in listed[0]:
            rows.add_column(heading, overflow="fold")
        for each in listed:
            rows.add_row(*(console.cell(value) for value in each.values()))
        console.out().print(rows)


def _described(
    model: str, base: str | None, lora_alpha: float | None, cache: str, *, tensors: bool
) -> dict[str, Any]:
    """What is known of an input; of an adapter that lacks its base or α, what it says itself."""
    from mergebench.core.errors import MergebenchError
    from mergebench.describe import describe, describe_unread
    from mergebench.sources.adapters import open_unread

    try:
        source = _open(model, base, lora_alpha, cache)
    except MergebenchError as error:
        found = open_unread(model) if error.lacks else None
        if found is None:
            raise
        adapter, files = found
        data = describe_unread(adapter, files, error)
        if tensors:
            data["tensor_list"] = [
                {"tensor": name, "stored": tensor.dtype, "shape": list(tensor.shape)}
                for name, tensor in adapter.tensors.items()
            ]
        return data
    data = describe(source)
    if tensors:
        data["tensor_list"] = _tensor_list(source)
    return data


def _words(key: str, value: Any) -> str:
    if key == "bytes":
        return console.size(value)
    if key == "files":
        return ", ".join(f"{each['name']} ({console.size(each['size'])})" for each in value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(
            f"{name} {number:,}" if isinstance(number, int) else f"{name} = {number}"
            for name, number in value.items()
        )
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tensor_list(source: Source) -> list[dict[str, Any]]:
    from mergebench.core.delta import LowRank
    from mergebench.describe import alpha_of, norm_of

    rows: list[dict[str, Any]] = []
    more = {} if source.deltas is None else {"alpha": "", "norm": ""}
    if source.checkpoint is not None:
        for name, tensor in source.checkpoint.tensors.items():
            rows.append(
                {"tensor": name, "stored": tensor.dtype, "shape": list(tensor.shape), **more}
            )
    for name, delta in (source.deltas or {}).items():
        stored, alpha = type(delta).__name__.lower(), ""
        if isinstance(delta, LowRank):
            stored = f"rank {delta.rank}, scale {delta.scale:g}"
            alpha = f"{alpha_of(source, delta):g}"
        norm = norm_of(delta)
        rows.append(
            {
                "tensor": name,
                "stored": stored,
                "shape": list(delta.shape),
                "alpha": alpha,
                "norm": "" if norm is None else f"{norm:.4g}",
            }
        )
    return rows


def diff(
    left: Annotated[str, typer.Argument(show_default=False)],
    right: Annotated[str, typer.Argument(show_default=False)],
    base: o.Base = None,
    lora_alpha: ro.LoraAlpha = None,
    cache: mo.Cache = "keep",
    top: Annotated[int, typer.Option("--top", min=1, help="How many tensors to show.")] = 20,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare two models, or two adapters, tensor by tensor. Exit code 1 if they differ.

    Examples:

    \b
      mergebench diff base merged
      mergebench diff adapter1 adapter2 --json
    """
    from mergebench.differences import differences

    one, two = (_open(each, base, lora_alpha, cache) for each in (left, right))
    with console.bar(quiet or as_json) as progress:
        show = progress
        rows = list(
            differences(
                one,
                two,
                None if show is None else lambda done, total: show("comparing", done, total),
            )
        )
    odd = [row for row in rows if row.status != "equal"]
    if as_json:
        console.say_json({"equal": len(rows) - len(odd), "rows": [row.to_json() for row in odd]})
    elif not quiet:
        _show_rows(odd[:], len(rows), top)
    if odd:
        raise typer.Exit(EXIT_FINDINGS)


def _show_rows(odd: list[Any], count: int, top: int) -> None:
    if not odd:
        console.say(f"equal: {count} tensors")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "status", "relative", "largest", "cosine"):
        table.add_column(heading, justify="left" if heading in ("tensor", "status") else "right")
    odd.sort(key=lambda row: (row.status == "differs", -row.relative))
    for row in odd[:top]:
        numbers = [f"{value:.4g}" for value in (row.relative, row.largest, row.cosine)]
        status = f"{row.status}: {row.detail}" if row.detail else row.status
        if row.status != "differs":
            numbers = ["", "", ""]
        table.add_row(console.cell(row.name), status, *numbers)
    console.out().print(table)
    more = f", {len(odd) - top} more not shown (--top)" if len(odd) > top else ""
    console.say(f"{len(odd)} of {count} tensors differ{more}")


def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="One method or op, in full (an op named like a method: --ops)."),
    ] = None,
    ops: Annotated[bool, typer.Option("--ops", help="The ops that methods are made of.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="All methods as a page.")] = False,
    as_json: o.Json = False,
) -> None:
    """List merge methods and ops, or describe one.

    Examples:

    \b
      mergebench methods
      mergebench methods ties
    """
    from mergebench.merge.catalogue import markdown as page
    from mergebench.merge.method import METHODS
    from mergebench.merge.op import OPS

    if markdown:
        console.say(page().rstrip())
        return
    if name is not None:
        if name in OPS and (ops or name not in METHODS):
            _show_op(name, as_json)
        else:
            _show_method(name, as_json)
        return
    rows = (
        [{"op": each, "what": OPS[each].summary} for each in OPS]
        if ops
        else [
            {"method": each, "what": METHODS[each].summary, "paper": METHODS[each].paper}
            for each in METHODS
        ]
    )
    if as_json:
        console.say_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console.out().print(table)


def _params(params: dict[str, Param]) -> list[dict[str, Any]]:
    return [
        {
            "name": each.name,
            "default": None if each.required else each.default,
            "allowed": each.describe(),
        }
        for each in params.values()
    ]


def _show_method(name: str, as_json: bool) -> None:
    from mergebench.merge.method import METHODS
    from mergebench.merge.op import OPS

    method = METHODS[name]
    data = {
        "name": name,
        "paper": method.paper,
        "space": method.space,
        "params": _params(dict(method.params)),
        "compat": {preset: dict(values) for preset, values in method.compat.items()},
        "doc": method.doc,
    }
    if as_json:
        console.say_json(data)
        return
    console.say(f"{name}  ({method.paper}; works in {method.space} space)\n\n{method.doc}\n")
    _show_params(data["params"])
    for preset, values in method.compat.items():
        console.say(f"--compat {preset}: " + ", ".join(f"{k}={v}" for k, v in values.items()))
    if name in OPS and OPS[name].apart != "each":
        console.say(f"After another method: --then {name}; see mergebench methods {name} --ops")


def _show_op(name: str, as_json: bool) -> None:
    from inspect import cleandoc

    from mergebench.merge.op import OPS

    spec = OPS[name]
    doc = cleandoc(spec.function.__doc__ or "")
    params = _params(dict(spec.params))
    if as_json:
        console.say_json({"name": name, "params": params, "doc": doc})
        return
    console.say(f"{name}  (op)\n\n{doc}\n")
    _show_params(params)


def _show_params(params: Any) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("parameter", "default", "allowed"):
        table.add_column(heading)
    for each in params:
        default = "required" if each["default"] is None else str(each["default"])
        table.add_row(each["name"], default, each["allowed"])
    if params:
        console.out().print(table)
