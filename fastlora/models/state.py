"""ModelState: the parts of a model. Every function that changes a model takes and returns one.

`fastlora.Model` adds methods to this record. The methods call functions all over the library, and
these functions take a ModelState, so that they need not import the methods.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

from fastlora.models.params import Adapter, Base
from fastlora.models.spec import LoraConfig, Spec

Seed = int | Int[Tensor, ""] | Int[Tensor, "n"] | None  # [n]: of each adapter of a stack
Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelState:
    """A base, an adapter (None: the base alone), and how to run them."""

    spec: Spec
    base: Base
    adapter: Adapter | None = None


StateT = TypeVar("StateT", bound=ModelState)  # functions return the class that they were given


def require_adapter(model: ModelState) -> tuple[LoraConfig, Adapter]:
    """The settings of a model's adapter, and the adapter.

    Raises:
        ValueError: the model has no adapter.
    """
    if model.spec.lora is None or model.adapter is None:
        raise ValueError(
            "the model has no adapter; fastlora.lora or fastlora.load_adapter attaches one."
        )
    return model.spec.lora, model.adapter
