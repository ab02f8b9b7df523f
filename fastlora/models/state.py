"""ModelState: what a model is made of, and what every verb of the library takes and returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

from fastlora.models.params import Adapter, Base
from fastlora.models.spec import LoraConfig, Spec

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


def require_adapter(model: ModelState) -> tuple[LoraConfig, Adapter]:
    """The settings of a model's adapter, and the adapter.

    Raises:
        ValueError: the model has no adapter.
    """
    if model.spec.lora is None or model.adapter is None:
        raise ValueError("the model has no adapter; fastlora.lora or load_adapter gives it one.")
    return model.spec.lora, model.adapter
