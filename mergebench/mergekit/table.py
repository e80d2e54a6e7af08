"""Which of mergekit's methods and parameters are which of ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mergebench.core.params import Param

PRESET = "mergekit-0.1.5"
#: How the base takes part: it is required and merged into, merged into where it is given, one of
#: the two ends, or an input like the others.
Base = Literal["required", "optional", "end", "input"]


class Known(Protocol):
    """What must be known of a merge method of ours."""

    @property
    def params(self) -> Mapping[str, Param]:
        """Declared parameters."""
        ...

    @property
    def compat(self) -> Mapping[str, Mapping[str, Any]]:
        """Presets."""
        ...


@dataclass(frozen=True)
class Rule:
    """How a method of mergekit is read.

    Attributes
    ----------
    base : required, optional, end or input
    shared : names of parameters
        That hold for all models of a slice.
    own : names of parameters
        That may stand beside a model too.
    weighted : bool
        Whether every model needs a weight; otherwise weights are not looked at.
    models : int or None
        How many models there must be besides the base; ``None`` for any number.
    """

    base: Base
    shared: Collection[str] = ()
    own: Collection[str] = ()
    weighted: bool = False
    models: int | None = None

    @property
    def names(self) -> list[str]:
        """Every parameter."""
        return [*(["weight"] if self.weighted else []), *self.own, *self.shared]


_SUM = ("lambda", "normalize", "int8_mask")
_RANDOM = (*_SUM, "rescale")

RULES: Mapping[str, Rule] = {
    "linear": Rule("input", ("normalize",), weighted=True),
    "task_arithmetic": Rule("required", _SUM, weighted=True),
    "ties": Rule("required", _SUM, ("density",), weighted=True),
    "breadcrumbs": Rule("required", _SUM, ("density", "gamma"), weighted=True),
    "breadcrumbs_ties": Rule("required", _SUM, ("density", "gamma"), weighted=True),
    "dare_linear": Rule("required", _RANDOM, ("density",), weighted=True),
    "dare_ties": Rule("required", _RANDOM, ("density",), weighted=True),
    "della": Rule("required", _RANDOM, ("density", "epsilon"), weighted=True),
    "della_linear": Rule("required", _RANDOM, ("density", "epsilon"), weighted=True),
    "slerp": Rule("end", ("t",), models=1),
    "nuslerp": Rule("optional", ("nuslerp_flatten", "nuslerp_row_wise"), weighted=True, models=2),
    "multislerp": Rule("optional", ("normalize_weights", "eps"), weighted=True),
    "karcher": Rule("input", ("max_iter", "tol")),
    "model_stock": Rule("required", ("filter_wise",)),
    "sce": Rule("required", ("select_topk", "int8_mask")),
    "arcee_fusion": Rule("required", models=1),
    "nearswap": Rule("required", ("t",), models=1),
    "ram": Rule("required", ("epsilon",)),
    "ramplus_tl": Rule("required", ("epsilon", "r", "alpha")),
    "passthrough": Rule("input", (), ("scale",), models=1),
}


@dataclass(frozen=True)
class Reading:
    """A parameter of mergekit, as one of ours.

    Attributes
    ----------
    name : str or None
        Ours; ``None`` for one without an effect on the result.
    values : mapping or None
        mergekit's values to ours; ``None`` for a number that is taken as it is.
    note : str
        What to say where it stands in a configuration.
    """

    name: str | None
    values: Mapping[Any, Any] | None = None
    note: str = ""


_FLAGS = {True: True, False: False}
_READINGS: Mapping[str, Reading] = {
    "lambda": Reading("lam"),
    "int8_mask": Reading(
        None, _FLAGS, "int8_mask changes how mergekit stores masks, and nothing here"
    ),
    "nuslerp_flatten": Reading("scope", {True: "tensor", False: "row"}),
    "filter_wise": Reading("scope", {True: "row", False: "tensor"}),
    "normalize_weights": Reading("normalize", _FLAGS),
    "rescale": Reading("rescale", {True: "l1", False: "none"}),
    "eps": Reading(
        None, None, "eps keeps mergekit from dividing by zero; here zeros are told apart exactly"
    ),
    # Vectors along the first dimension are not offered, so only the other way has a counterpart.
    "nuslerp_row_wise": Reading(None, {False: False}),
}


def reading(name: str, method: Known) -> Reading | None:
    """How a parameter is read for a method of ours; ``None`` if the method has none such."""
    if name == "normalize":
        if "normalize" in method.params:
            return Reading("normalize", _FLAGS)
        if "divisor" in method.params:
            return Reading("divisor", {True: "weights", False: "none"})
        return None
    found = _READINGS.get(name, Reading(name))
    return found if found.name is None or found.name in method.params else None


#: Options of mergekit's command line that some configurations hold, and why they do not matter.
OPTIONS: Mapping[str, str] = {
    **dict.fromkeys(
        ("lazy_unpickle", "low_cpu_memory", "async_write", "num_threads", "transformers_cache",
         "lora_merge_cache", "safe_serialization"),
        "decides how mergekit reads and writes, and no value",
    ),
    **dict.fromkeys(
        ("cuda", "device", "low_gpu_memory", "read_to_gpu", "multi_gpu", "gpu_rich"),
        "decides where mergekit computes; here merges stream through the CPU",
    ),
    **dict.fromkeys(("quiet", "verbose", "verbosity"), "decides what mergekit prints"),
    "allow_crimes": "lets mergekit mix architectures; here names and shapes are checked all the "
    "same",
    "trust_remote_code": "nothing from the folder of a model is executed here",
}  # fmt: skip


#: Messages between ``<|im_start|>`` and ``<|im_end|>``.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DTYPES: Mapping[str, str] = {
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
}
