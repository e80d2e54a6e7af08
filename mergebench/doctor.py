"""What the machine and the installation offer, and what is missing or broken."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from mergebench.compute.machine import core_quota, cores, free_memory, memory, memory_limit
from mergebench.core.errors import did_you_mean
from mergebench.packages import broken_imports, install_line, installed, packages

#: Variables of the Hub whose values are no secret.
_PLAIN = re.compile(
    r"HF_(HOME|ENDPOINT|ASSETS_CACHE|DATASETS_CACHE|MODULES_CACHE|XET_CACHE|DEBUG"
    r"|HUB_(CACHE|OFFLINE|ETAG_TIMEOUT|DOWNLOAD_TIMEOUT|VERBOSITY|ENABLE_HF_TRANSFER"
    r"|DISABLE_[A-Z_]+)|XET_[A-Z_]+)"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH|CREDENTIAL", re.IGNORECASE)
_FEWEST_FILES = 64


def environment() -> dict[str, Any]:
    """Interpreter, system, processor, memory in bytes, and the threads of every BLAS."""
    import numpy as np
    import scipy.linalg
    from threadpoolctl import threadpool_info

    del np, scipy
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "executable": sys.executable,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "usable_cores": cores(),
        "core_quota": core_quota(),
        "memory": {"total": memory(), "available": free_memory(), "limit": memory_limit()},
        "blas": [
            {
                "library": each.get("internal_api", ""),
                "version": each.get("version") or "",
                "threads": each.get("num_threads", 0),
                "architecture": each.get("architecture", ""),
                "used_by": _owner(str(each.get("filepath", ""))),
            }
            for each in threadpool_info()
        ],
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor()


def _owner(path: str) -> str:
    """The package that brings a library along: the folder below site-packages."""
    _, found, rest = path.replace("\\", "/").rpartition("site-packages/")
    return rest.split("/")[0].removesuffix(".libs") if found else path


def accelerators() -> dict[str, Any]:
    """What torch sees; importing it takes seconds."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "torch": str(torch.__version__),
        "cuda": [
            {
                "name": torch.cuda.get_device_name(index),
                "memory": int(torch.cuda.get_device_properties(index).total_memory),
            }
            for index in range(count)
        ],
        "mps": bool(torch.backends.mps.is_available()),
        "threads": torch.get_num_threads(),
    }


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of mergebench and of the Hub; of what may be secret only that it is set."""
    found = {}
    for name in sorted(environ):
        if not name.startswith(("MERGEBENCH_", "HF_", "HUGGING_FACE_", "HUGGINGFACE_")):
            continue
        ours = name.startswith("MERGEBENCH_") and not _SECRET.search(name)
        plain = ours or (_PLAIN.fullmatch(name) and not _SECRET.search(name))
        found[name] = _without_user(environ[name]) if plain else "set" if environ[name] else "empty"
    return found


def _without_user(value: str) -> str:
    """An address without the name and password that it may hold."""
    scheme, found, rest = value.partition("://")
    if not found:
        return value
    # What follows a question mark may be a token as well.
    place = rest.partition("?")[0]
    return f"{scheme}://{'…@' if '@' in rest else ''}{place.rpartition('@')[2]}"


def limits() -> dict[str, int | None]:
    """Limits of this process: open files, bytes of a file, of memory; ``None`` for no limit."""
    try:
        import resource
    except ImportError:  # not on Windows
        return {}
    kinds = {
        "open_files": resource.RLIMIT_NOFILE,
        "file_size": resource.RLIMIT_FSIZE,
        "address_space": resource.RLIMIT_AS,
    }
    found = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return {name: None if at == resource.RLIM_INFINITY else at for name, at in found.items()}


def examine(
    environ: Mapping[str, str],
    known: Collection[str] = (),
    *,
    torch: bool = False,
) -> dict[str, Any]:
    """Everything but the disk, and what is wrong with it.

    Parameters
    ----------
    environ : mapping of str to str
    known : collection of str
        Variables that mergebench reads; others of its prefix are told.
    torch : bool, default False
        Ask torch for CUDA and MPS.

    Returns
    -------
    dict
        JSON-able. ``problems`` is a list of sentences.
    """
    about = metadata("mergebench")
    requirements = about.get_all("Requires-Dist") or []
    needed = packages(requirements)
    broken = broken_imports([row["name"] for row in needed if row["fits"]])
    extras = {}
    for extra in about.get_all("Provides-Extra") or []:
        missing = [row for row in packages(requirements, extra) if not row["fits"]]
        extras[extra] = {
            "missing": missing,
            "install": install_line(extra) if missing else "",
        }
    data: dict[str, Any] = {
        "mergebench": installed("mergebench"),
        "environment": environment(),
        "packages": needed,
        "extras": extras,
        "variables": variables(environ),
        "limits": limits(),
    }
    problems = list(_about_packages(needed, broken))
    problems += [
        f"{name} is no variable of mergebench: {did_you_mean(name, known)}"
        for name in data["variables"]
        if name.startswith("MERGEBENCH_") and known and name not in known
    ]
    files = data["limits"].get("open_files")
    if files is not None and files < _FEWEST_FILES:
        problems.append(f"at most {files} files may be open at once; raise it with `ulimit -n`")
    if torch:
        try:
            data["accelerators"] = accelerators()
        except Exception as error:
            problems.append(f"torch cannot be imported: {type(error).__name__}: {error}")
    return {**data, "problems": problems}


def _about_packages(needed: Sequence[Mapping[str, Any]], broken: Mapping[str, str]) -> list[str]:
    found = []
    for row in needed:
        name = row["name"]
        if row["found"] is None:
            found.append(f"{name} is not installed: pip install '{name}{row['wanted']}'")
        elif not row["fits"]:
            found.append(
                f"{name} is {row['found']}, {row['wanted']} is needed: "
                f"pip install '{name}{row['wanted']}'"
            )
        elif name in broken:
            found.append(f"{name} {row['found']} cannot be imported: {broken[name]}")
    return found
