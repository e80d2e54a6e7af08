"""Ops by name, and parts of a model that are merged otherwise, as recipes hold them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mergebench.core.errors import FormatError, ParameterError, did_you_mean
from mergebench.core.rules import parse_weight
from mergebench.core.schedule import parse_schedule, to_plain

_PART = re.compile(r"(?P<select>.+):(?P<method>\w+)(?::(?P<set>\w+=.*))?", re.DOTALL)


@dataclass(frozen=True)
class OpRef:
    """One op by name, with parameters as the user wrote them."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Tensors that are merged by a method of their own.

    Attributes
    ----------
    include, exclude : tuple of str
        Selectors: the part has what any of ``include`` matches (everything if it is empty) and
        none of ``exclude``, unless an earlier part has it.
    method : str
        ``""`` where ``ops`` are given instead.
    params : mapping
        Of the method, each with one value, which may be a schedule.
    ops, then : tuple of OpRef
        As in a recipe.
    compat : str or None
    weights : tuple of float, Gradient or Cases
        One for each model, in their order; empty for the weights that the models have.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    method: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    ops: tuple[OpRef, ...] = ()
    then: tuple[OpRef, ...] = ()
    compat: str | None = None
    weights: tuple[Any, ...] = ()

    @property
    def select(self) -> str:
        """What the part has, for messages."""
        without = f", without {', '.join(self.exclude)}" if self.exclude else ""
        return (", ".join(self.include) or "everything") + without

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is at its default."""
        data: dict[str, Any] = {"select": _select_out(self)}
        data |= {"ops": [op_out(each) for each in self.ops]} if self.ops else {}
        data |= {"method": self.method} if self.method else {}
        if self.params:
            data["params"] = {key: to_plain(value) for key, value in self.params.items()}
        if self.then:
            data["then"] = [op_out(each) for each in self.then]
        if self.compat is not None:
            data["compat"] = self.compat
        if self.weights:
            data["weights"] = [to_plain(each) for each in self.weights]
        return data


def _select_out(part: Part) -> Any:
    if part.exclude:
        include = {"include": list(part.include)} if part.include else {}
        return {**include, "exclude": list(part.exclude)}
    return part.include[0] if len(part.include) == 1 else list(part.include)


def op_out(each: OpRef) -> Any:
    """Plain data of an op: its name, or ``{name: {parameter: value}}``."""
    params = {key: to_plain(value) for key, value in each.params.items()}
    return {each.name: params} if params else each.name


def parse_op(text: str) -> OpRef:
    """``name:k=v,k=v`` as written after ``--then``."""
    name, _, rest = text.partition(":")
    return OpRef(name, dict(parse_assignment(part) for part in rest.split(",") if part))


def parse_assignment(text: str) -> tuple[str, str]:
    """``k=v`` as written after ``-p``.

    Raises
    ------
    ParameterError
        If there is no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ParameterError("a parameter is written name=value", got=repr(text))
    return key.strip(), value.strip()


def parse_part(text: str) -> Part:
    """``SELECTOR:METHOD`` or ``SELECTOR:METHOD:k=v,k=v`` as written after ``--method-for``.

    Raises
    ------
    ParameterError
        If it is not written so, or a parameter is given twice.
    """
    match = _PART.fullmatch(text)
    if match is None:
        raise ParameterError(
            "a part is written SELECTOR:METHOD or SELECTOR:METHOD:name=value",
            got=repr(text),
            fix="such as class=norm:linear or self_attn:ties:density=0.3,lam=0.5",
        )
    params: dict[str, str] = {}
    for piece in (match["set"] or "").split(","):
        if piece:
            key, value = parse_assignment(piece)
            if key in params:
                raise ParameterError(f"part {text!r} gives {key!r} twice", fix="keep one of them")
            params[key] = value
    return Part(include=(match["select"],), method=match["method"], params=params)


@contextmanager
def named_file(where: str) -> Iterator[None]:
    """Name the recipe in errors about a value in it."""
    try:
        yield
    except ParameterError as error:
        raise FormatError(
            f"{where}: {error.what}", got=error.got, expected=error.expected, fix=error.fix
        ) from None


def op_in(data: Any, where: str) -> OpRef:
    """One op out of plain data.

    Raises
    ------
    FormatError
        If it is none.
    """
    if isinstance(data, str):
        return parse_op(data)
    if isinstance(data, Mapping) and len(data) == 1:
        name, params = next(iter(data.items()))
        # What follows a colon would be parameters once the name stands alone.
        named = isinstance(name, str) and ":" not in name
        if named and (params is None or isinstance(params, Mapping)):
            return OpRef(name, {str(k): v for k, v in (params or {}).items()})
    raise FormatError(f"{where}: an op is a name or `name: {{parameter: value}}`", got=repr(data))


def ops_in(data: Mapping[str, Any], key: str, where: str) -> tuple[OpRef, ...]:
    """The ops under a key of plain data.

    Raises
    ------
    FormatError
        If they are none.
    """
    value = [] if data.get(key) is None else data[key]
    if isinstance(value, (str, Mapping)):
        value = [value]
    if not isinstance(value, list):
        raise FormatError(f"{where}: `{key}` must be a list of ops", got=repr(value))
    with named_file(f"{where}: `{key}`"):
        return tuple(op_in(each, f"{where}: `{key}`") for each in value)


def texts_in(data: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The texts under a key of plain data, which may be a single one.

    Raises
    ------
    FormatError
        If they are none.
    """
    value = [] if data.get(key) is None else data[key]
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise FormatError(f"{where}: `{key}` must be a text or a list of texts", got=repr(value))
    return tuple(listed)


def text_in(data: Mapping[str, Any], key: str, where: str) -> str | None:
    """The text under a key of plain data.

    Raises
    ------
    FormatError
        If it is none.
    """
    value = data.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
        raise FormatError(f"{where}: `{key}` must be text", got=repr(value))
    return None if value is None else str(value)


def parts_in(data: Mapping[str, Any], where: str) -> tuple[Part, ...]:
    """The parts of a recipe out of plain data.

    Raises
    ------
    FormatError
        If one is none.
    """
    value = [] if data.get("parts") is None else data["parts"]
    if not isinstance(value, list):
        raise FormatError(f"{where}: `parts` must be a list", got=repr(value)[:200])
    return tuple(part_in(each, f"{where}: parts[{i}]") for i, each in enumerate(value))


def part_in(data: Any, where: str) -> Part:
    """One part out of plain data, or as :func:`parse_part` reads it.

    Raises
    ------
    FormatError
        For unknown keys and wrong types, or without ``select``, or a method or ops.
    """
    if isinstance(data, str):
        with named_file(where):
            return parse_part(data)
    if not isinstance(data, Mapping) or "select" not in data:
        raise FormatError(
            f"{where}: a part is `{{select: …, method: …, params: …}}`", got=repr(data)[:200]
        )
    _known(data, ["select", "method", "params", "ops", "then", "compat", "weights"], where)
    include, exclude = _select_in(data, where)
    method, ops = text_in(data, "method", where) or "", ops_in(data, "ops", where)
    if bool(method) == bool(ops):
        raise FormatError(f"{where}: needs one of `method` and `ops`", fix="give exactly one")
    return Part(
        include=include,
        exclude=exclude,
        method=method,
        params=_params_in(data.get("params"), where),
        ops=ops,
        then=ops_in(data, "then", where),
        compat=text_in(data, "compat", where),
        weights=_weights_in(data.get("weights"), where),
    )


def _known(data: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise FormatError(f"{where}: unknown key {key!r}", fix=did_you_mean(str(key), known))


def _select_in(data: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    select = data["select"]
    if isinstance(select, Mapping):
        _known(select, ["include", "exclude"], f"{where}: select")
        include, exclude = (texts_in(select, key, where) for key in ("include", "exclude"))
    else:
        include, exclude = texts_in(data, "select", where), ()
    if not include and not exclude:
        raise FormatError(
            f"{where}: `select` is empty", fix="give a regular expression, class=norm or block=0-3"
        )
    return include, exclude


def _params_in(data: Any, where: str) -> dict[str, Any]:
    params = {} if data is None else data
    if not isinstance(params, Mapping):
        raise FormatError(f"{where}: `params` must be a mapping", got=repr(params)[:200])
    for name, value in params.items():
        if isinstance(value, list):
            raise FormatError(
                f"{where}: `{name}` has several values, and one output for each is what the "
                "recipe's own `params` give",
                got=repr(value)[:200],
                fix="write one value",
            )
    with named_file(where):
        return {
            str(name): parse_schedule(value, str(name)) if isinstance(value, Mapping) else value
            for name, value in params.items()
        }


def _weights_in(data: Any, where: str) -> tuple[Any, ...]:
    if data is None:
        return ()
    if not isinstance(data, list) or not data:
        raise FormatError(f"{where}: `weights` must be a list of numbers", got=repr(data)[:200])
    with named_file(where):
        return tuple(parse_weight(each, "weights") for each in data)
