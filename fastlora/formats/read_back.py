"""largest_difference(): how far a written folder is from the model that was written."""

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


def largest_difference(model: ModelState, folder: Path) -> float:
    """Largest absolute difference between the logits of a model and of a folder's, on 32 tokens.

    Layers of the folder stay on the host and are moved to the device one at a time.
    """
    spec, device = model.spec, model.base["norm"].device
    config, written = read_base(folder)
    moved: Any = {k: x.to(device) for k, x in written.items() if isinstance(x, Tensor)}
    base = cast(Base, moved | {"layers": _LayersOnDemand(written["layers"], device)})
    # Compiling takes longer than these two passes.
    eager = replace(spec, compile=False)
    ids = _token_ids(spec).to(device)
    with torch.no_grad():
        expected = functional.forward(model.adapter, model.base, eager, ids)
        actual = functional.forward(None, base, replace(eager, config=config, lora=None), ids)
    return float((expected.double() - actual.double()).abs().max())


class _LayersOnDemand(Sequence):
    """The layers of a base tree; indexing moves one to a device."""

    def __init__(self, layers: Sequence[Any], device: torch.device):
        self.layers, self.device = layers, device

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: Any) -> Any:
        return tree_map(lambda x: x.to(self.device), self.layers[i])


def _token_ids(spec: Spec) -> Int[Tensor, "1 t"]:
    """Ids spread over the vocabulary, the same for every call: multiples of a large prime."""
    t = min(32, spec.max_seq_length)
    return (7919 * torch.arange(1, t + 1, device="cpu") % spec.config.vocab_size)[None]
