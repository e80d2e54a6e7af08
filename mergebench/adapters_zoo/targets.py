"""Programs that a LoRA is written for: their names, and what they take.

Facts about servers are those of vLLM 0.33, SGLang 0.5.23 and LoRAX, read in their sources.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mergebench.adapters_zoo.dialects import dotted, peft
from mergebench.core.errors import MismatchError, ParameterError, did_you_mean

Dialect = Literal["peft", "kohya", "diffusers"]
_STEPS = (8, 16, 32, 64, 128, 256, 320, 512)
_HEADS = frozenset({"classifier", "score"})
_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Target:
    """What a program takes.

    Attributes
    ----------
    name : str
    dialect : str
    ranks : tuple of int
        One rank for all modules, zero-padded to the next of these; empty: the rank as it is.
    most : int or None
        Largest rank.
    serves : bool
        Whether it is a server: weights are cast to the model's dtype there, and only linear
        layers and embeddings are adapted.
    """

    name: str
    dialect: Dialect
    ranks: tuple[int, ...] = ()
    most: int | None = None
    serves: bool = False

    def padded(self, rank: int) -> int:
        """The rank in the file, for the largest rank of a module.

        Raises
        ------
        MismatchError
            If it is larger than the program takes.
        """
        if self.most is not None and rank > self.most:
            raise MismatchError(
                f"adapter: rank for {self.name}",
                expected=f"at most {self.most}",
                got=str(rank),
                fix=f"truncate it with --rank {self.most} or --energy 0.99",
            )
        return next((step for step in self.ranks if step >= rank), rank)


TARGETS: Mapping[str, Target] = {
    each.name: each
    for each in (
        Target("peft", "peft", _STEPS),
        Target("vllm", "peft", _STEPS, 512, serves=True),
        Target("sglang", "peft", _STEPS, serves=True),
        Target("lorax", "peft", (16, 32, 64, 128), 128, serves=True),
        Target("kohya", "kohya"),
        # Without α in the file it takes the commonest rank for the α of all modules.
        Target("diffusers", "diffusers", _STEPS),
    )
}


def target_named(name: str) -> Target:
    """The target of this name.

    Raises
    ------
    ParameterError
        If there is none.
    """
    if name not in TARGETS:
        raise ParameterError(f"target: {name!r}", fix=did_you_mean(name, TARGETS))
    return TARGETS[name]


def check_served(
    target: Target,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rank: int,
) -> tuple[str, ...]:
    """What a user of the target should know about an adapter that is to be written.

    Raises
    ------
    MismatchError
        If the target would refuse it, or get it wrong.
    """
    if not target.serves:
        return ()
    if found := refusals(target.name, config, shapes, rank):
        raise MismatchError(
            f"adapter: {target.name} does not take it: {'; '.join(found)}",
            fix="write it for peft, or leave these modules out with --exclude",
        )
    said = served_with(target.name, rank)
    return () if said == "yes" else (f"{target.name} serves it: {said}",)


def served_with(server: str, rank: int | None) -> str:
    """What a server that takes an adapter of this rank must be told; "yes" where nothing."""
    # vLLM's default is 16, and it knows some values only.
    if server == "vllm" and rank is not None and rank > 16:
        allowed = next(step for step in _STEPS if step >= rank)
        return f"with --max-lora-rank {allowed} (its default is 16)"
    if server == "sglang" and rank is not None:
        return f"with --max-lora-rank {rank} or more"
    return "yes"


def refusals(
    server: str,
    config: Mapping[str, Any] | None,
    shapes: Mapping[str, tuple[int, ...]],
    rank: int | None,
) -> list[str]:
    """Why a server would refuse an adapter, or get it wrong; empty where it serves it.

    Parameters
    ----------
    server : vllm, sglang or lorax
    config : mapping or None
        ``adapter_config.json``.
    shapes : mapping of tensor name to shape
        The adapter's own tensors.
    rank : int or None
        The largest rank of a module.
    """
    if config is None or config.get("peft_type") != "LORA":
        return ["it takes LoRAs in PEFT's folders with an adapter_config.json only"]
    found = [
        f"{entry} is refused"
        for entry in ("use_dora", "alora_invocation_tokens", "layer_replication", "lora_bias")
        if config.get(entry)
    ]
    if any("lora_magnitude_vector" in name or name.endswith(".dora_scale") for name in shapes):
        found.append("magnitudes (DoRA) are refused")
    if (config.get("bias") or "none") != "none":
        found.append(f"bias {config['bias']!r} is refused")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGED):
        found.append(f"init_lora_weights {config['init_lora_weights']!r} is refused")
    found += _saved(server, config.get("modules_to_save") or ())
    most = TARGETS[server].most
    if most is not None and rank is not None and rank > most:
        found.append(f"rank {rank} is larger than {most}")
    if kernels := sorted(n for n, shape in shapes.items() if len(shape) > 2):
        found.append(f"convolutions are not adapted ({kernels[0]})")
    if server == "sglang":
        if config.get("use_rslora"):
            found.append("use_rslora is ignored: it would scale by α/r")
        patterns = [e for e in ("rank_pattern", "alpha_pattern") if config.get(e)]
        found += [f"{entry} is ignored: it would scale all modules alike" for entry in patterns]
        if not isinstance(config.get("target_modules"), list):
            found.append("target_modules must be a list")
        if any("trainable_tokens" in name for name in shapes):
            found.append("added tokens are refused")
    if server == "lorax" and (odd := _odd(shapes)):
        found.append(f"only base_model.model.….lora_A.weight and lora_B.weight are read ({odd[0]})")
    return found


def _saved(server: str, saved: Collection[str]) -> list[str]:
    others = sorted({name.rpartition(".")[2] for name in saved} - _HEADS)
    if server != "vllm":
        others = sorted(saved)
    return [f"modules_to_save is refused ({', '.join(others[:3])})"] if others else []


def _odd(shapes: Collection[str]) -> list[str]:
    ends = (".lora_A.weight", ".lora_B.weight")
    return sorted(n for n in shapes if not n.startswith(peft.PREFIX) or not n.endswith(ends))


def default_target(names: Collection[str], flat: bool, layout: str | None) -> Target:
    """The program that most likely reads an adapter with these names.

    Parameters
    ----------
    names : collection of str
        Displaced tensors.
    flat : bool
        Whether they are Kohya's flattened names.
    layout : original, diffusers or None
        That of a base which is a diffusion model.
    """
    if flat or layout == "original":
        return TARGETS["kohya"]
    if layout == "diffusers" or (names and all(map(dotted.is_component, names))):
        return TARGETS["diffusers"]
    return TARGETS["peft"]
