"""self_contained(): a model without the two things that only the library knows how to read.

A running model may differ from (checkpoint's base, PEFT adapter) in two ways:

- an initial offset: frozen factors A0 and B0 in the base's linear layers (init_offset.py);
- parked originals: embedding and head, of which a copy is trained, wait in a file on the host
  (adapters/parked_originals.py writes it).

Every function that hands a model to another program or makes another model of it calls
`self_contained` first, and need not know of either.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastlora.models.init_offset import fold_offset, without_offset
from fastlora.models.names import END_WEIGHTS
from fastlora.models.params import Base
from fastlora.models.spec import Extras
from fastlora.models.state import StateT


def self_contained(model: StateT, *, unpark: bool = True) -> StateT:
    """The model that computes the same with nothing but a checkpoint's base and an adapter.

    The given model itself if it has neither an initial offset nor parked originals.

        base    {"q_proj": {"weight": W, "offset": (A0, B0)}}      {"q_proj": {"weight": W}}
        adapter {"q_proj": (A, B)}, rank r                    ->   {"q_proj": ([A; A0], [B, -B0])}, 2r
        base    {"embed_tokens": on the host}                      {"embed_tokens": on the device}

    Args:
        model: any model.
        unpark: False leaves parked originals on the host, for callers that do not compute with
            them: bringing them back takes 2 GiB of device memory for an 8B model.
    """
    spec, adapter = fold_offset(model.spec, model.base, model.adapter)
    base = without_offset(model.base)
    if unpark:
        base = unpark_originals(base)
    if base is model.base and adapter is model.adapter:
        return model
    return replace(model, spec=spec, base=base, adapter=adapter)


def unread(base: Base, extras: Extras) -> list[str]:
    """Keys of the base that a model with these copies never reads: "embed_tokens", "lm_head"."""
    copied = [key for key, name in END_WEIGHTS.items() if name in extras.replaced]
    if "lm_head" in base:
        return copied
    # A tied matrix is read by whichever of the two has no copy.
    return ["embed_tokens"] if (extras.tied and copied) or len(copied) == 2 else []


def parked_originals(base: Base) -> dict[str, Tensor]:
    """Key -> tensor, for what waits elsewhere than the base is."""
    if base["norm"].device.type == "cpu":
        return {}
    return {k: base[k] for k in END_WEIGHTS if k in base and base[k].device.type == "cpu"}


def unpark_originals(base: Base) -> Base:
    """The base whole on its own device; itself where it is."""
    away = {key: x.to(base["norm"].device) for key, x in parked_originals(base).items()}
    whole: Any = {**base, **away} if away else base
    return whole
