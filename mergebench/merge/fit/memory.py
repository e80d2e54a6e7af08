"""Memory that does not suffice, and what needs less of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod

from mergebench.core.delta import LowRank
from mergebench.core.errors import MergebenchError
from mergebench.merge.plan import Plan

#: What torch says where an allocation fails on the CPU.
_WORDS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "can't allocate memory")
ADVICE = (
    "hold fewer blocks with --budget SIZE or --blocks N, give adapters (held as factors) in place "
    "of full fine-tunes (`mergebench edit extract-lora`), a smaller --batch-size, or "
    "--precision bfloat16"
)


class RoomError(MergebenchError):
    """What is to be held does not fit."""


@contextmanager
def advised(device: str) -> Iterator[None]:
    """Say what needs less memory, where an allocation fails.

    Raises
    ------
    RoomError
    """
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _error(device, error) from error
    except RuntimeError as error:
        if any(word in str(error) for word in _WORDS):
            raise _error(device, error) from error
        raise


def _error(device: str, error: BaseException) -> RoomError:
    got = (str(error).splitlines() or [""])[0][:160]
    return RoomError(f"learning ran out of memory on {device}", got=got, fix=ADVICE)


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
    """Bytes of memory of a device; ``None`` if the system does not say."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def check_room(plan: Plan, device: str, budget: int | None = None) -> None:
    """Refuse what cannot fit, from headers alone.

    Raises
    ------
    RoomError
    """
    least, most = needed(plan, budget), there(device)
    if most is not None and least > most:
        raise RoomError(
            f"learning needs at least {least / 1e9:.1f} GB on {device}",
            got=f"{most / 1e9:.1f} GB",
            fix=ADVICE,
        )
