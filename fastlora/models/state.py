"""ModelState: what a model is made of, and what every verb of the library takes and returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxtyping import Int
from torch import Tensor

from fastlora.models.names import END_WEIGHTS
from fastlora.models.params import Adapter, Base
from fastlora.models.spec import Extras, LoraConfig, Spec

Seed = int | Int[Tensor, ""] | None
Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelState:
    """A base, an adapter if there is one, and how to run them.

    `fastlora.Model` adds methods to this record. Functions that take a model take a ModelState, so
    that they need not import the methods, which call them.
    """

    spec: Spec
    base: Base
    adapter: Adapter | None = None


StateT = TypeVar("StateT", bound=ModelState)  # a verb returns the class that it was given


def present(spec: Spec, adapter: Adapter | None) -> tuple[LoraConfig, Adapter]:
    """The adapter and its settings.

    Raises:
        ValueError: if there are none.
    """
    if spec.lora is None or adapter is None:
        raise ValueError("the model has no adapter; fastlora.lora or load_adapter gives it one.")
    return spec.lora, adapter


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
