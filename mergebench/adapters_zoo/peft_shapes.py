"""Shapes that PEFT's layers give their tensors, as far as they follow from the base weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mergebench.adapters_zoo.peft_bridge import Layer
from mergebench.adapters_zoo.resolve import share
from mergebench.core.errors import MismatchError

#: Sizes in order; None is any, and what follows the last one is any too. A quotient that is no
#: whole number, which no tensor has, stays a text.
Sizes = tuple[int | str | None, ...]


@dataclass(frozen=True)
class Fit:
    """What the shape of a tensor depends on.

    Attributes
    ----------
    rows, columns : int
        Outputs and inputs of the adapted module.
    kernel : tuple of int
        Of a convolution, else empty.
    biased : bool
        Whether the module has a bias.
    stored : tuple of int
        Shape of the tensor in the file.
    entries : mapping
        Of the config, looked at.
    """

    rows: int
    columns: int
    kernel: tuple[int, ...]
    biased: bool
    stored: tuple[int, ...]
    entries: Mapping[str, object]

    @property
    def first(self) -> int:
        """Size of the first axis, at least 1."""
        return max(self.stored[0], 1) if self.stored else 1

    def number(self, entry: str, default: int) -> int:
        """A whole number of the config, at least 1."""
        value = self.entries.get(entry)
        return max(value, 1) if isinstance(value, int) else default


def _quotient(total: int, parts: int) -> int | str:
    return f"{total}/{parts}" if total % parts else total // parts


def _inputs(fit: Fit) -> Sizes:
    return (None, fit.columns, *fit.kernel)


def _outputs(fit: Fit) -> Sizes:
    return (fit.rows,)


def _places(fit: Fit) -> Sizes:
    return (min(fit.first, fit.rows * fit.columns),)


def _vectors_in(fit: Fit) -> Sizes:
    return (None, _quotient(fit.columns, fit.number("vector_length", 256)))


def _vectors_out(fit: Fit) -> Sizes:
    return (_quotient(fit.rows, fit.number("vector_length", 256)),)


def _turns(fit: Fit) -> Sizes:
    twice = {"road_2": 2, "road_4": 4}.get(str(fit.entries.get("variant")), 1)
    return (_quotient(fit.rows * twice, 2),)


#: Suffix of a tensor -> the sizes that PEFT gives it.
SHAPES: Mapping[str, Callable[[Fit], Sizes]] = {
    "(fourierft|waveft)_spectrum": _places,
    "randlora_gamma": lambda fit: (None, min(fit.rows, fit.columns)),
    "vblora_logits_A(_topk_(indices|weights))?": _vectors_in,
    "vblora_logits_B(_topk_(indices|weights))?": _vectors_out,
    "unilora_(indices|scales)_A": _inputs,
    "unilora_(indices|scales)_B": _outputs,
    "tinylora_A": _inputs,
    "tinylora_B": _outputs,
    "p?vera_lambda_b": _outputs,
    "delora_A": _inputs,
    "delora_B": _outputs,
    "delora_w_norm": lambda fit: (fit.columns,),
    "gralora_A": lambda fit: (None, _quotient(fit.columns, fit.first)),
    "gralora_B": lambda fit: (None, None, _quotient(fit.rows, fit.first)),
    r"gralora_A_general\.weight": _inputs,
    r"gralora_B_general\.weight": _outputs,
    "supertuning_(indices|values)": _places,
    r"supertuning_lora_A\.weight": _inputs,
    r"supertuning_lora_B\.weight": _outputs,
    # The bias is one more column of what the clusters are found in.
    "adamss_newB": lambda fit: (None, fit.columns + fit.biased),
    "hira_A": _inputs,
    "hira_B": _outputs,
    "hira_embedding_A": lambda fit: (None, fit.rows),
    "hira_embedding_B": lambda fit: (fit.columns,),
    r"psoft_R\.vector_[ab]": lambda fit: (min(fit.first, fit.rows, fit.columns),),
    r"osf_svd_params\.U_low": _outputs,
    r"osf_svd_params\.V_low": _inputs,
    "deft_P": _outputs,
    "deft_R": _inputs,
    r"peanut_A\.weight": lambda fit: (None, fit.rows),
    r"peanut_B\.weight": _outputs,
    r"glora_[AB]\.Xd": _outputs,
    r"glora_[AB]\.Xu": _inputs,
    r"glora_C\.(Xd|zeros)": lambda fit: (fit.columns,),
    # One number for all, or one for each output or input.
    r"glora_[ABDE]\.X": lambda fit: (1 if fit.first == 1 else fit.rows,),
    r"glora_C\.X": lambda fit: (1 if fit.first == 1 else fit.columns,),
    r"glora_[DE]\.zeros": _outputs,
    "road_(alpha|theta)": _turns,
}
_FORMS = tuple((re.compile(suffix), sizes) for suffix, sizes in SHAPES.items())


def misfit(layer: Layer, entries: Mapping[str, object]) -> tuple[str, str] | None:
    """A tensor of a layer that does not fit its base weight, and the shape it would have.

    Parameters
    ----------
    layer : Layer
    entries : mapping
        Of the config, looked at.

    Returns
    -------
    tuple of two str, or None
        The suffix and the sizes, ``*`` for those that do not follow from the base; None where
        headers show nothing wrong.
    """
    rows, columns, *kernel = layer.shape
    if layer.form == "conv1d":
        rows, columns = columns, rows
    for suffix, tensor in sorted(layer.tensors.items()):
        fit = Fit(rows, columns, tuple(kernel), layer.biased, tensor.shape, entries)
        for form, sizes in _FORMS:
            if form.fullmatch(suffix) is None:
                continue
            wanted, shape = sizes(fit), tensor.shape
            same = all(each in (None, n) for each, n in zip(wanted, shape, strict=False))
            if not same or len(shape) < len(wanted):
                some = [*wanted, *[None] * (len(shape) - len(wanted))]
                return suffix, ", ".join("*" if each is None else str(each) for each in some)
    return None


def check_shapes(
    label: str, targets: Mapping[str, str], layers: list[Layer], entries: Mapping[str, object]
) -> None:
    """Refuse tensors that do not fit the base weights that they adapt.

    Parameters
    ----------
    label : str
    targets : mapping of str to str
        The base weight of each module.
    layers : list of Layer
    entries : mapping
        Of the config, looked at.

    Raises
    ------
    MismatchError
        It names the first, and counts the modules that do not fit.
    """
    found = [(layer, wrong) for layer in layers if (wrong := misfit(layer, entries)) is not None]
    if not found:
        return
    layer, (suffix, wanted) = found[0]
    raise MismatchError(
        f"{label}: {layer.name}.{suffix} does not fit {targets[layer.name]}"
        f"{share(len(found), len(layers))}",
        expected=f"shape ({wanted}) on a weight of {layer.shape}",
        got=str(layer.tensors[suffix].shape),
        fix="check that --base is the model that the adapter was trained on",
    )
