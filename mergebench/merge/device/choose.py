"""Which device chains are run on, and what is said of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mergebench.core.errors import ParameterError

#: The same path without an accelerator, to compare with: torch on the processor.
HOST = "torch"
#: Dtypes that stored entries cross in, and that results are rounded to there.
ON_DEVICE = frozenset({"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32"})
_SPELLED = re.compile(r"cpu|auto|torch|cuda(:\d+)?")


@dataclass(frozen=True)
class Device:
    """Where torch runs chains.

    Attributes
    ----------
    name : str
        As torch spells it, such as ``cuda:0``.
    title : str
        What stands in a manifest: the model of the device, and the version of torch.
    """

    name: str
    title: str

    @property
    def note(self) -> str:
        """The sentence that goes with an output."""
        return (
            f"computed on {self.title}: entries may differ by a rounding from those of a processor"
        )


def check_spelling(asked: str) -> None:
    """Refuse what names no device, without importing torch.

    Raises
    ------
    ParameterError
    """
    if not _SPELLED.fullmatch(asked):
        raise ParameterError(f"--device: {asked!r}", expected="cpu, cuda, cuda:1, auto or torch")


def device_of(asked: str) -> Device | None:
    """The device of a name; ``None`` for the processor, where torch is not needed.

    Parameters
    ----------
    asked : cpu, cuda, cuda:N, auto or torch
        ``auto`` is the first CUDA device, or the processor where there is none; ``torch`` runs
        the path of accelerators on the processor.

    Raises
    ------
    ParameterError
        If it is none of these, or is not there.
    """
    check_spelling(asked)
    if asked == "cpu":
        return None
    import torch

    if asked == HOST:
        return Device("cpu", f"a processor through torch {torch.__version__}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto" and count == 0:
        return None
    index = int(asked.partition(":")[2] or 0)
    if index >= count:
        raise ParameterError(
            f"--device {asked}: there is none",
            got=f"{count} CUDA devices",
            expected=f"cuda:0 to cuda:{count - 1}" if count else "cpu",
            fix="`mergebench doctor` shows what torch finds",
        )
    return Device(
        f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, torch {torch.__version__}"
    )


def torch_device(asked: str) -> str:
    """The device of a name, as torch spells it; for what runs in torch on the processor too.

    Raises
    ------
    ParameterError
        As :func:`device_of`.
    """
    found = device_of(asked)
    return "cpu" if found is None else found.name
