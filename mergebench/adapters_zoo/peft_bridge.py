"""Displacements that PEFT's own layers compute, on a skeleton of the adapted modules.

Nothing of the model is loaded but, where a family needs it, one weight at a time. PEFT sees
modules called ``m0_``, ``m1_`` …, tensors, and entries of the config that were looked at: no name,
pattern, path or code of a file.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np

from mergebench.core.errors import FormatError, MergebenchError, MismatchError
from mergebench.core.tensor import DTYPES, Array, Tensor, read_all
from mergebench.packages import install_line, installed

#: What a family needs of the base: nothing; the weight while the layer is built; or also when it
#: is merged.
Need = Literal["nothing", "build", "merge"]
Form = Literal["linear", "conv1d", "embedding", "conv"]
_KEPT = 2
_LOAD = "default"


def known(index: int) -> str:
    """What PEFT knows a module as; none of these names is a part of another."""
    return f"m{index}_"


@dataclass(frozen=True, eq=False)
class Layer:
    """One adapted module.

    Attributes
    ----------
    name : str
        As the adapter spells it.
    form : str
        What the module is: ``linear``, ``conv1d`` (a linear layer stored input × output),
        ``embedding`` or ``conv``.
    shape : tuple of int
        Of its weight.
    tensors : mapping of suffix to Tensor
        Its tensors in the file.
    weight, bias : Tensor or None
        Of the base; no weight where the family needs none.
    biased : bool
        Whether the module has a bias.
    """

    name: str
    form: Form
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    weight: Tensor | None
    bias: Tensor | None
    biased: bool

    @property
    def dtype(self) -> str:
        """Of its displacement: F64 where the weight or a tensor of the file is, else F32."""
        stored = [*self.tensors.values(), *([] if self.weight is None else [self.weight])]
        return "F64" if any(each.dtype == "F64" for each in stored) else "F32"


@dataclass(frozen=True, eq=False)
class Bridge:
    """The layers of one adapter, as PEFT computes them.

    Attributes
    ----------
    label, peft_type : str
    entries : mapping
        Of the config, looked at; patterns already resolved to what PEFT knows
    layers : sequence of Layer
        In the order in which the model has them, where that matters.
    shared : mapping of suffix to Tensor
        Tensors that belong to all layers.
    need : str
    double : bool, default True
        Whether PEFT can compute in float64.
    """

    label: str
    peft_type: str
    entries: Mapping[str, Any]
    layers: Sequence[Layer]
    shared: Mapping[str, Tensor]
    need: Need
    double: bool = True
    _lock: Lock = field(default_factory=Lock, repr=False)
    _models: dict[str, Any] = field(default_factory=dict, repr=False)
    _changes: OrderedDict[int, dict[str, Array]] = field(default_factory=OrderedDict, repr=False)

    def change(self, index: int) -> dict[str, Array]:
        """Displacements of a layer's parameters, ``weight`` and where it moves ``bias``.

        The last few layers are remembered: tensors are read in pieces.
        """
        with self._lock:
            if index not in self._changes:
                self._changes[index] = self._compute(index)
            self._changes.move_to_end(index)
            while len(self._changes) > _KEPT:
                self._changes.popitem(last=False)
            return self._changes[index]

    def _compute(self, index: int) -> dict[str, Array]:
        import torch

        layer = self.layers[index]
        with _quietly(), torch.no_grad():
            try:
                if self.need == "nothing":
                    if not self._models:
                        self._models["all"] = self._built(range(len(self.layers)))
                    model = self._models["all"]
                else:
                    model = self._built((index,))
                return self._merged(model.get_submodule(f"base_model.model.{known(index)}"), layer)
            except MergebenchError:
                raise
            except Exception as error:
                raise MismatchError(
                    f"{self.label}: PEFT cannot compute {layer.name}",
                    got=" ".join((f"{type(error).__name__}:", *str(error).split())),
                    fix="check that --base is the model that the adapter was trained on",
                ) from error

    def _built(self, indices: Sequence[int]) -> Any:
        """A PEFT model of these layers with the adapter in it."""
        import peft
        from torch import nn

        skeleton = nn.Module()
        for index in indices:
            skeleton.add_module(known(index), self._module(self.layers[index]))
        kind: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(self.peft_type)]
        names = [known(index) for index in indices]
        config = kind(**self.entries, target_modules=names, inference_mode=True)
        model = peft.get_peft_model(skeleton, config, adapter_name=_LOAD).to(self._dtype())
        state = {f"base_model.{suffix}": tensor for suffix, tensor in self.shared.items()}
        for index in indices:
            for suffix, tensor in self.layers[index].tensors.items():
                state[f"base_model.model.{known(index)}.{suffix}"] = tensor
        arrays = {key: self._tensor(tensor) for key, tensor in state.items()}
        # PEFT scatters these into a tensor of its own in single precision.
        arrays = {k: v.float() if k.endswith("_topk_weights") else v for k, v in arrays.items()}
        found: Any = peft.set_peft_model_state_dict(model, arrays, adapter_name=_LOAD)
        prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft.PeftType(self.peft_type)]
        strange = list(found.unexpected_keys)
        now = model.state_dict()
        # Layers refer to what is shared, so that the same memory has several names.
        filled = {now[key].data_ptr() for key in now.keys() - set(found.missing_keys)}
        lacking = [
            key
            for key in found.missing_keys
            if prefix in key and key in now and now[key].data_ptr() not in filled
        ]
        if strange or lacking:
            raise MismatchError(
                f"{self.label}: its tensors are not those that PEFT expects",
                expected=f"{self._spelled(lacking[0])} too" if lacking else "",
                got=self._spelled(strange[0]) if strange else "",
                fix="the config is of another adapter, or of another version of PEFT",
            )
        return model.eval()

    def _spelled(self, key: str) -> str:
        for index, layer in enumerate(self.layers):
            key = key.replace(f".{known(index)}.", f".{layer.name}.")
        return key

    def _dtype(self) -> Any:
        import torch

        return torch.float64 if self.double else torch.float32

    def _tensor(self, tensor: Tensor) -> Any:
        import torch

        array = read_all(tensor)
        if array.dtype.kind not in "iub":
            array = array.astype(np.float64 if self.double else np.float32)
        return torch.from_numpy(np.array(array))

    def _module(self, layer: Layer) -> Any:
        """The module without values, or with the base's where they are needed."""
        import torch
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        first, second, *kernel = layer.shape
        with torch.device("meta"):
            module: Any
            if layer.form == "embedding":
                module = nn.Embedding(first, second)
            elif layer.form == "conv1d":
                kind: Any = Conv1D
                module = kind(second, first)
            elif layer.form == "linear":
                module = nn.Linear(second, first, bias=layer.biased)
            else:
                kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
                module = kind(second, first, tuple(kernel), bias=layer.biased)
        for name, parameter in list(module.named_parameters()):
            stored = {"weight": layer.weight, "bias": layer.bias}[name]
            value = (
                torch.zeros((), dtype=self._dtype()).expand(parameter.shape)
                if stored is None
                else self._tensor(stored)
            )
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        return module

    def _merged(self, module: Any, layer: Layer) -> dict[str, Array]:
        """Merge into zeros, or into the base's values where the family looks at them."""
        from torch import nn

        under = module.get_base_layer()
        before = dict(under.named_parameters())
        for name, parameter in before.items():
            start = parameter.data.clone().contiguous()
            if self.need != "merge":
                start.zero_()
            setattr(under, name, nn.Parameter(start.clone(), requires_grad=False))
        module.merge()
        moved = {
            name: (parameter.data - before[name].data) if self.need == "merge" else parameter.data
            for name, parameter in under.named_parameters()
        }
        for name, parameter in before.items():
            setattr(under, name, parameter)
        module.merged_adapters.clear()
        dtype = DTYPES[layer.dtype]
        arrays = {name: value.detach().numpy().astype(dtype) for name, value in moved.items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise FormatError(f"{self.label}: {layer.name} has values that are not finite")
        return arrays


@dataclass(frozen=True, eq=False)
class ThroughPeft:
    """A displacement that PEFT computes when it is first read.

    Attributes
    ----------
    bridge : Bridge
    index : int
        Of the layer.
    parameter : str
        ``weight`` or ``bias``.
    shape : tuple of int
    """

    bridge: Bridge
    index: int
    parameter: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """F32, or F64 where a stored part is."""
        return self.bridge.layers[self.index].dtype

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened displacement, shape ``(stop-start,)``."""
        whole = self.bridge.change(self.index)[self.parameter].reshape(-1)
        values: Array = whole[start:stop]
        if out is None:
            return values.copy()
        place = out[: values.nbytes].view(values.dtype)
        place[:] = values
        return place


def need_peft(label: str, family: str) -> None:
    """Check that PEFT is installed and has a family; it is not imported yet.

    Raises
    ------
    FormatError
        If it is missing, or too old.
    """
    specs = {name: importlib.util.find_spec(name) for name in ("peft", "transformers")}
    if missing := [name for name, spec in specs.items() if spec is None]:
        raise FormatError(
            f"{label}: {family} is computed by PEFT's own layers, and {missing[0]} is not "
            "installed",
            fix=install_line("peft"),
        )
    assert specs["peft"] is not None
    places = specs["peft"].submodule_search_locations or ()
    if not any((Path(place) / "tuners" / family).is_dir() for place in places):
        raise FormatError(
            f"{label}: peft {installed('peft')} does not have {family}", fix="pip install -U peft"
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without PEFT's warnings, and without moving the random numbers of the process."""
    import torch

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield
