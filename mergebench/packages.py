"""Which packages are installed, and which are needed for what."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

#: Importing it takes seconds, so it is tried on request only.
SLOW = "torch"


def install_line(extra: str) -> str:
    """The command that installs what an extra needs."""
    return f"pip install 'mergebench[{extra}]'"


def installed(name: str) -> str | None:
    """The version of a package, ``None`` where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def packages(
    requirements: Sequence[str], extra: str = "", found: Callable[[str], str | None] = installed
) -> list[dict[str, Any]]:
    """Required packages, wanted and found versions.

    Parameters
    ----------
    requirements : sequence of str
        As in the metadata of a package: ``"gguf>=0.10; extra == 'gguf'"``.
    extra : str, default ""
        Only what this extra adds; without it only what is always needed.
    found : callable
        Version by name, or ``None``.

    Returns
    -------
    list of dict
        ``name``, ``wanted``, ``found`` and ``fits``.
    """
    from packaging.requirements import Requirement

    rows = []
    for text in requirements:
        each = Requirement(text)
        always = each.marker is None or each.marker.evaluate({"extra": ""})
        if always if extra else not always:
            continue
        if extra and (each.marker is None or not each.marker.evaluate({"extra": extra})):
            continue
        if each.name == "mergebench":
            for inner in sorted(each.extras):
                rows += packages(requirements, inner, found)
            continue
        held = found(each.name)
        fits = held is not None and each.specifier.contains(held, prereleases=True)
        rows.append({"name": each.name, "wanted": str(each.specifier), "found": held, "fits": fits})
    return sorted(rows, key=lambda row: str(row["name"]).lower())


def broken_imports(names: Collection[str]) -> dict[str, str]:
    """Packages whose import fails, with the reason; all are imported but :data:`SLOW`."""
    modules: dict[str, list[str]] = {}
    for module, owners in packages_distributions().items():
        for owner in owners:
            modules.setdefault(_plain(owner), []).append(module)
    broken = {}
    for name in names:
        for module in modules.get(_plain(name), []):
            # Private modules and folders of stubs or tests are nobody's business.
            if name == SLOW or not module.isidentifier() or module.startswith("_"):
                continue
            try:
                import_module(module)
            except Exception as error:
                broken[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return broken


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
