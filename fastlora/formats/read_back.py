"""read_back."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora import functional
from fastlora.checkpoints.reading import read_base
from fastlora.models.params import Base
from fastlora.models.spec import Spec
from fastlora.models.state import ModelState


# ── read back ─────────────────────────────────────────────────────────────────────────────
class _LayerByLayer(Sequence):
    """Layers of a mapped file, of which one at a time is on a device."""

    def __init__(self, layers: Sequence[Any], device: torch.device):
        self.layers, self.device = layers, device

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: Any) -> Any:
        return tree_map(lambda x: x.to(self.device), self.layers[i])


def largest_difference(model: ModelState, folder: Path) -> float:
    """Largest difference of logits between a model and what a folder holds."""
    spec, device = model.spec, model.base["norm"].device
    config, found = read_base(folder)
    ends: Any = {k: x.to(device) for k, x in found.items() if isinstance(x, Tensor)}
    again = cast(Base, ends | {"layers": _LayerByLayer(found["layers"], device)})
    plain = replace(spec, compile=False)
    ids = _few_tokens(spec).to(device)
    with torch.no_grad():
        ours = functional.forward(model.adapter, model.base, plain, ids)
        theirs = functional.forward(None, again, replace(plain, config=config, lora=None), ids)
    return float((ours.double() - theirs.double()).abs().max())


def _few_tokens(spec: Spec) -> Int[Tensor, "1 t"]:
    """Ids from all over the vocabulary, the same every time."""
    t = min(32, spec.max_seq_length)
    return (7919 * torch.arange(1, t + 1) % spec.config.vocab_size)[None]
