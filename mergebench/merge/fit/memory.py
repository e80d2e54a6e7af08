"""Memory that does not suffice, and what needs less of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from traceback import clear_frames

from mergebench.compute.machine import free_memory
from mergebench.core.delta import LowRank
from mergebench.core.errors import MergebenchError
from mergebench.merge.plan import Plan

#: What torch says where an allocation fails on the CPU, and Python where a stack does.
_WORDS = (
    "DefaultCPUAllocator",
    "not enough memory",
    "out of memory",
    "can't allocate memory",
    "can't start new thread",
)
#: What was asked for, as torch and numpy say it.
_ASKED = re.compile(r"(?:[Tt]ried|Unable) to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
ADVICE = (
    "hold fewer blocks with --budget SIZE or --blocks N, leave tensors out with --exclude "
    "SELECTOR, give adapters (held as factors) in place of full fine-tunes (`mergebench edit "
    "extract-lora`), a smaller --batch-size, or --precision bfloat16"
)
STATISTICS = (
    "leave tensors out with --exclude SELECTOR (merges average them), such as class=head or the "
    "layers of the widest inputs, of which a Gram matrix holds the square; run fewer examples at a "
    "time with --batch-size, or fewer of them with --limit or --batches"
)
GRAFT = (
    "leave tensors out with --exclude SELECTOR (they stay as in the base), such as block=0-3; run "
    "fewer examples at a time with --batch-size, or fewer of them with --limit"
)


class RoomError(MergebenchError):
    """What is to be held does not fit."""


@contextmanager
def advised(device: str, what: str = "learning", advice: str = ADVICE) -> Iterator[None]:
    """Say what needs less memory, where an allocation fails.

    Parameters
    ----------
    device : str
    what : str
        What is being done.
    advice : str

    Raises
    ------
    RoomError
    """
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _error(device, error, what, advice) from error
    except RuntimeError as error:
        if any(word in str(error) for word in _WORDS):
            raise _error(device, error, what, advice) from error
        raise


def _error(device: str, error: BaseException, what: str, advice: str) -> RoomError:
    said = str(error)
    found, left = _ASKED.search(said), available(device)
    # What the calls that failed still hold is given back: telling of it takes memory too.
    clear_frames(error.__traceback__)
    asked = 0 if found is None else float(found[1]) * 1024 ** _UNITS.index(found[2])
    parts = [f"{_size(asked)} asked for"] if asked else []
    # More than what was asked for is there again, where what failed has let go of it.
    if left is not None and not 0 < asked <= left:
        parts.append(f"{_size(left)} available")
    got = ", ".join(parts) or (said.splitlines() or [""])[0][:160]
    return RoomError(f"{what} ran out of memory on {device}", got=got, fix=advice)


def _size(count: float) -> str:
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.4g} {_UNITS[power]}"


def available(device: str) -> int | None:
    """Bytes that are free on a device, within the limits of this process, as far as is known."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    if (free := free_memory()) is not None:
        found.append(free)
    if (limit := _limit()) is not None:
        with suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            found.append(max(limit - pages * os.sysconf("SC_PAGE_SIZE"), 0))
    return min(found, default=None)


def needed(plan: Plan, budget: int | None = None) -> int:
    """Bytes that learning holds at least: base, model, gradients, and the vectors.

    Parameters
    ----------
    budget : int, optional
        The most bytes of vectors, where not all are held.
    """
    entries = vectors = 0
    for item in plan.aligned.items.values():
        entries += item.site.size
        for delta in item.deltas:
            if isinstance(delta, LowRank):
                vectors += 4 * (prod(delta.B.shape) + prod(delta.A.shape))
            elif delta is not None:
                vectors += 2 * item.site.size
    return 12 * entries + (vectors if budget is None else min(vectors, budget))


def there(device: str) -> int | None:
    """Bytes of memory of a device, or that this process may have; ``None`` if nobody says."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    found = []
    with suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if (limit := _limit()) is not None:
        found.append(limit)
    return min(found, default=None)


def _limit() -> int | None:
    """Bytes of addresses that this process may use, where that is limited."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        return None if limit == resource.RLIM_INFINITY else limit
    return None


def check_room(plan: Plan, device: str, budget: int | None = None) -> None:
    """Refuse to learn what cannot fit, from headers alone.

    Raises
    ------
    RoomError
    """
    check_fits(needed(plan, budget), device)


def check_fits(least: int, device: str, what: str = "learning", advice: str = ADVICE) -> None:
    """Refuse what needs more memory than a device has, or this process may use.

    Raises
    ------
    RoomError
    """
    most = there(device)
    if most is not None and least > most:
        raise RoomError(
            f"{what} needs at least {_size(least)} on {device}",
            got=_size(most),
            fix=advice,
        )
