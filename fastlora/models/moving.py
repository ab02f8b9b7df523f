"""Move a model to another device."""

from dataclasses import replace

import torch
from torch.utils._pytree import tree_map

from fastlora.models.self_contained import parked_originals
from fastlora.models.state import StateT
from fastlora.runtime.layer_fetching import is_sharded


def moved(model: StateT, device: torch.device | str) -> StateT:
    """The model on another device. Tensors that are there already are shared, not copied.

    Originals that are parked in a file on the host stay there.

    Raises:
        ValueError: the base is sharded.
    """
    if is_sharded(model.base):
        raise ValueError(
            "a sharded base stays where load(shard=) has put it; fastlora.gathered(model) gives a"
            " model that moves."
        )
    parked = {id(x) for x in parked_originals(model.base).values()}
    move = lambda tree: tree_map(lambda x: x if id(x) in parked else x.to(device), tree)
    adapter = None if model.adapter is None else move(model.adapter)
    return replace(model, base=move(model.base), adapter=adapter)
