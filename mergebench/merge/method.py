"""Merge methods: registered factories from parameters to chains of ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import cleandoc
from typing import Any, Literal, TypeVar

from mergebench.core.errors import ParameterError, did_you_mean
from mergebench.core.params import Param, bind, declared
from mergebench.core.registry import Registry
from mergebench.merge.op import Chain

F = TypeVar("F", bound=Callable[..., Chain])
Space = Literal["weight", "delta", "either"]


@dataclass(frozen=True)
class Method:
    """A registered merge method.

    Attributes
    ----------
    name, paper : str
        The name on the command line, and the paper as ``arXiv:…``, ``doi:…`` or an address.
    factory : callable
        Returns the chain for a set of parameters.
    params : mapping
        Declared parameters, from the factory's annotated signature.
    space : weight, delta or either
        ``weight`` methods combine weights and need no base; ``delta`` methods combine task
        vectors; ``either`` combines task vectors where a base is given and weights otherwise.
    compat : mapping of preset name to parameter values
        Defaults that reproduce another implementation; explicit parameters win.
    models : tuple (least, most)
        How many models it takes; ``most`` is ``None`` where there is no limit.
    checked : mapping of implementation to tolerance
        What else its results were compared with, and how near they were, in words.
    """

    name: str
    factory: Callable[..., Chain]
    params: Mapping[str, Param]
    paper: str = ""
    space: Space = "delta"
    compat: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    models: tuple[int, int | None] = (1, None)
    checked: Mapping[str, str] = field(default_factory=dict)

    @property
    def doc(self) -> str:
        """The whole docstring."""
        return cleandoc(self.factory.__doc__ or "")

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return self.doc.split("\n")[0]

    def expand(self, given: Mapping[str, Any], compat: str | None = None) -> dict[str, Any]:
        """Every parameter with its value: given over preset over declared default.

        Raises
        ------
        ParameterError
            For unknown names or presets, and for values out of bounds.
        """
        preset: Mapping[str, Any] = {}
        if compat is not None:
            if compat not in self.compat:
                raise ParameterError(
                    f"{self.name}: no compat preset {compat!r}",
                    fix=did_you_mean(compat, self.compat),
                )
            preset = self.compat[compat]
        return bind(self.name, self.params, given, preset)

    def __call__(self, compat: str | None = None, **params: Any) -> Chain:
        """The chain for explicit parameters over preset and declared defaults."""
        return self.factory(**self.expand(params, compat))


METHODS: Registry[Method] = Registry(
    "merge method", "mergebench.merge.methods", "mergebench.methods"
)


def merge_method(
    *,
    paper: str = "",
    space: Space = "delta",
    compat: Mapping[str, Mapping[str, Any]] | None = None,
    models: tuple[int, int | None] = (1, None),
    checked: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Register a function ``(**params) -> chain`` as a merge method under its own name."""

    def register(factory: F) -> F:
        name = factory.__name__
        params = declared(factory)
        about = paper, space, compat or {}, models, checked or {}
        METHODS.add(name, Method(name, factory, params, *about))
        return factory

    return register
