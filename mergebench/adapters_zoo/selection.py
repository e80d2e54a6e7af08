"""Lists of module names that select, by PEFT's rules, exactly the modules meant.

``target_modules`` and ``exclude_modules`` match whole parts at the end of a path;
``modules_to_save`` matches any end of a path, also within a part.
"""

from __future__ import annotations

from collections.abc import Collection

from mergebench.core.errors import FormatError, MismatchError

_DELTA = "write the task vector itself (--as delta)"


def saved_modules(
    replacements: Collection[str], adapted: Collection[str], known_names: Collection[str] | None
) -> list[str]:
    """``modules_to_save`` for tensors written in full.

    Parameters
    ----------
    replacements : collection of str
        Tensor names.
    adapted : collection of str
        Modules that get low-rank factors.
    known_names : collection of str or None
        All tensor names of the base, where there is one.

    Raises
    ------
    FormatError
        For a tensor outside of any module.
    MismatchError
        If the list would cover another module, or a module is not replaced whole.
    """
    saved = {name.rpartition(".")[0] for name in replacements}
    if "" in saved:
        name = min(name for name in replacements if "." not in name)
        raise FormatError(f"{name}: a tensor outside of any module has no adapter form")
    others = sorted((modules_of(known_names or ()) - saved) | set(adapted))
    for module in sorted(saved):
        hit = [one for one in others if one.endswith(module)]
        hit += [one for one in sorted(adapted) if f".{module}." in f".{one}."]
        if hit:
            raise MismatchError(
                f"adapter: {module} is written in full, which in PEFT covers {hit[0]} too",
                fix=_DELTA,
            )
        whole = {name for name in known_names or () if name.startswith(f"{module}.")}
        if missing := sorted(whole - set(replacements)):
            raise MismatchError(
                f"adapter: {module} is written in full only with all of its tensors",
                expected=f"{missing[0]} too",
                fix=f"add the base's own values of it, or {_DELTA}",
            )
    return sorted(saved)


def target_modules(
    adapted: Collection[str], known_names: Collection[str] | None
) -> dict[str, list[str]]:
    """``target_modules``, and ``exclude_modules`` where they are needed.

    The last parts of the paths where these select the same modules of the base, else the paths.

    Parameters
    ----------
    adapted : collection of str
        Modules that get low-rank factors.
    known_names : collection of str or None
        All tensor names of the base; None gives full paths.
    """
    wanted = set(adapted)
    if known_names is None:
        return {"target_modules": sorted(wanted)}
    known = modules_of(known_names) | wanted
    short = {module.rpartition(".")[2] for module in wanted}
    if _selected(known, short) == wanted:
        return {"target_modules": sorted(short)}
    lists = {"target_modules": sorted(wanted)}
    # A surplus module that cannot be excluded without excluding an adapted one is harmless: its
    # factors are absent, and PEFT starts with B = 0.
    surplus = _selected(known, wanted) - wanted
    if excluded := [one for one in sorted(surplus) if not _selected(wanted, {one})]:
        lists["exclude_modules"] = excluded
    return lists


def modules_of(names: Collection[str]) -> set[str]:
    """Every module that holds one of these tensors, at any depth."""
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:count]) for count in range(1, len(parts)))
    return found


def _selected(known: set[str], targets: set[str]) -> set[str]:
    ends = {module: {module[at:] for at in _starts(module)} for module in known}
    return {module for module in known if ends[module] & targets}


def _starts(module: str) -> list[int]:
    return [0, *(at + 1 for at, letter in enumerate(module) if letter == ".")]
