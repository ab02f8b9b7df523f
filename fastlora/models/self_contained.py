"""self_contained(): prepares a model for other programs and for functions that make new models.

A running model may differ from (checkpoint's base, PEFT adapter) in two ways:

- an initial offset: frozen factors A0 and B0 in the base's linear layers (init_offset.py);
- parked originals: embedding and head, of which a copy is trained, are mapped from a file on the
  host (adapters/parked_originals.py writes it).

Every function that hands a model to another program, or makes another model of it, calls
`self_contained` first. Such functions need not know of offsets and parked originals.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastlora.models.init_offset import fold_offset, without_offset
from fastlora.models.names import EDGE_WEIGHTS
from fastlora.models.params import Base
from fastlora.models.spec import Extras
from fastlora.models.state import StateT


def self_contained(model: StateT, *, unpark: bool = True) -> StateT:
    """The same function, expressed with only a checkpoint's base and an adapter.

    A model without an initial offset and parked originals is returned as the same object.

        base    {"q_proj": {"weight": W, "offset": (A0, B0)}}   ->  {"q_proj": {"weight": W}}
        adapter {"q_proj": (A, B)} of rank r      ->  {"q_proj": ([A; A0], [B, -B0])} of rank 2r
        base    {"embed_tokens": on the host}     ->  {"embed_tokens": on the device}

    Args:
        model: any model.
        unpark: False leaves parked originals on the host, for callers that do not compute with
            them: bringing them back takes 2 GiB of device memory for an 8B model.
    """
    spec, adapter = fold_offset(model.spec, model.base, model.adapter)
    base = without_offset(model.base)
    if unpark:
        base = unpark_originals(base)
    # Each step returns the object that it was given if there is nothing to do.
    if base is model.base and adapter is model.adapter:
        return model
    return replace(model, spec=spec, base=base, adapter=adapter)


def unread(base: Base, extras: Extras) -> list[str]:
    """Keys of the base's tensors that a model with these trained copies never reads.

    They may be "embed_tokens", "lm_head" or both.
    """
    copied = [key for key, name in EDGE_WEIGHTS.items() if name in extras.replaced]
    if "lm_head" in base:
        return copied
    # One matrix serves as embedding and head. Whichever of the two has no copy still reads it.
    return ["embed_tokens"] if (extras.tied and copied) or len(copied) == 2 else []


def parked_originals(base: Base) -> dict[str, Tensor]:
    """Key -> tensor, for embedding and head if they are on the CPU and the base is not."""
    # The final norm is never parked, so it shows the device of the base.
    if base["norm"].device.type == "cpu":
        return {}
    edges = {k: base[k] for k in EDGE_WEIGHTS if k in base}
    is_parked = lambda x: isinstance(x, Tensor) and x.device.type == "cpu"
    return {k: x for k, x in edges.items() if is_parked(x)}


def unpark_originals(base: Base) -> Base:
    """The base with all its tensors on one device; the same object if they are there already."""
    returned = {key: x.to(base["norm"].device) for key, x in parked_originals(base).items()}
    complete: Any = {**base, **returned} if returned else base
    return complete
