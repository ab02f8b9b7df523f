"""layers_of(): what the memory and the time of each layer depend on, besides the model's shape."""

from collections.abc import Collection
from functools import cache
from typing import NamedTuple

from fastlora.models.levels import layer_levels, offload_levels
from fastlora.models.names import linear_names
from fastlora.models.params import FUSED, GATE_UP
from fastlora.models.spec import Recompute, Target
from fastlora.models.state import ModelState, require_adapter
from fastlora.ops.swiglu.swiglu import kernel_supports

QKV = ("q_proj", "k_proj", "v_proj", *(name for name in FUSED if FUSED[name] == "self_attn"))
DOWN = ("down_proj", "output_linear")


class Layer(NamedTuple):
    """A layer in a training step."""

    level: str
    """Its recompute level (models/levels.py)."""
    targets: tuple[Target, ...]
    """Its adapters."""
    fused: bool
    """Whether the SwiGLU kernel adds the low-rank terms of gate and up."""
    dropout: bool
    """Whether the inputs of adapters are masked."""
    trained: bool = True
    """Whether it has a backward pass. Layers before the first adapter have none."""

    def adapts(self, names: Collection[str]) -> bool:
        """Whether any of these projections has an adapter."""
        return any(target.name in names for target in self.targets)

    @property
    def reads_hidden(self) -> bool:
        """Whether the gradient of down's A needs silu(gate) * up as a tensor. The SwiGLU kernel
        computes that gradient itself, except under dropout."""
        return self.adapts(DOWN) and (self.dropout or not self.fused)


def layers_of(model: ModelState, recompute: Recompute, tokens: int) -> tuple[Layer, ...]:
    """All layers under a recompute policy, for a batch of so many tokens."""
    lora, _ = require_adapter(model)
    dropout = lora.lora_dropout > 0
    first = next((i for i, targets in enumerate(lora.targets) if targets), len(lora.targets))
    fused = cache(lambda targets: _swiglu_is_fused(model, targets))
    return tuple(
        Layer(level, targets, fused(targets), dropout, trained=i >= first)
        for i, (level, targets) in enumerate(
            zip(levels_of(model, recompute, tokens), lora.targets, strict=True)
        )
    )


def levels_of(model: ModelState, recompute: Recompute, tokens: int) -> tuple[str, ...]:
    """The level of every layer under a recompute policy; see models/levels.py."""
    config = model.spec.config
    if recompute == "offload":
        return offload_levels(config, tokens, model.base["norm"].element_size())
    return layer_levels(config, recompute)


def _swiglu_is_fused(model: ModelState, targets: tuple[Target, ...]) -> bool:
    """Whether the SwiGLU kernel runs in a layer with these adapters."""
    if model.spec.kernels == "torch":
        return False
    ranks = {target.name: target.r for target in targets}
    fits = lambda r: r is not None and kernel_supports(model.base["norm"].dtype, r)
    names = [n for n in linear_names(model.spec.config) if n in GATE_UP]
    return all(fits(ranks.get(name)) for name in names)
