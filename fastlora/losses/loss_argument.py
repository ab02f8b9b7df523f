"""The values that `train(loss=...)` takes: a name, a record of objectives.py, or a function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.arguments import Rule, describe, setting
from fastlora.losses.objectives import DFT, DPO, KTO, ORPO, Objective, SimPO
from fastlora.models.params import Adapter, Base
from fastlora.models.spec import Spec
from fastlora.models.state import Batch, ModelState, Seed


@dataclass(frozen=True, kw_only=True, eq=False)
class FromFunction(Objective):
    """A function `(adapter, base, spec, batch, *, seed)` of the user's.

    It returns the sum of its losses over the trained tokens of a batch of supervised rows.

    Raises:
        ValueError: in `loss_sum`, if it returns something else, or a value without a gradient.
    """

    fn: Callable[..., Tensor] = setting(Rule(callable, "a function"))

    def loss_sum(
        self, adapter: Adapter, base: Base, spec: Spec, batch: Batch, seed: Seed
    ) -> Float[Tensor, ""]:
        value = self.fn(adapter, base, spec, batch, seed=seed)
        if not isinstance(value, Tensor) or value.dim() != 0:
            found = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"loss={self.describe()} returned {found}: expected a tensor without dimensions,"
                " the sum of the losses over the batch's trained tokens. (functional.loss_sum"
                " returns a pair, of which the first is that sum.)"
            )
        has_gradient = value.requires_grad or not torch.is_grad_enabled()
        if not has_gradient and any(x.requires_grad for x in tree_leaves(adapter)):
            raise ValueError(
                f"loss={self.describe()} returned a value without a gradient, so nothing would be"
                " trained: compute it from the adapter without torch.no_grad(), detach() or item()"
            )
        return value

    def describe(self) -> str:
        name = getattr(self.fn, "__qualname__", type(self.fn).__qualname__)
        return f"function {getattr(self.fn, '__module__', None)}.{name}"


NAMED: dict[str, type[Objective]] = {
    "dpo": DPO, "orpo": ORPO, "kto": KTO, "simpo": SimPO, "dft": DFT,
}  # fmt: skip
SUPERVISED = "sft"

LOSS = Rule(
    lambda x: (
        isinstance(x, Objective)
        or (type(x) is str and x in (SUPERVISED, *NAMED))
        or (callable(x) and not isinstance(x, type))
    ),
    f"{', '.join(map(repr, (SUPERVISED, *NAMED)))}, a record such as fastlora.losses.DPO(beta=0.2)"
    " or losses.Distill(teacher=...), or a function",
)


def objective_of(loss: Any, model: ModelState) -> Objective | None:
    """The objective that `train(loss=...)` means, for a value that `LOSS` accepts; None for "sft".

    Args:
        loss: a name, an `Objective` or a function.
        model: the model at the start of the run, for `reference="start"`.
    """
    if isinstance(loss, Objective):
        return loss.started_from(model)
    if isinstance(loss, str):
        return None if loss == SUPERVISED else NAMED[loss]().started_from(model)
    return FromFunction(fn=loss)


def loss_problems(settings: Any) -> list[str]:
    """One line for each argument of `train` that rows with preferences cannot have.

    Args:
        settings: of `train`. For such rows train_on must be "responses", because replies are
            compared, too_long "error", because a cut reply is another reply, and on_bad_row
            "error".
    """
    loss = settings.loss
    kind = NAMED.get(loss, Objective) if isinstance(loss, str) else type(loss)
    if not issubclass(kind, Objective) or kind.rows == "supervised":
        return []
    only = {"train_on": "responses", "too_long": "error", "on_bad_row": "error"}
    return [
        f"{name}={describe(value)} with rows of preferences, which loss={kind.__name__.lower()!r}"
        f" needs: expected {expected!r}"
        for name, expected in only.items()
        if (value := getattr(settings, name)) != expected
    ]


def loss_identity(loss: Any) -> str:
    """A text that tells two losses apart, for records of runs."""
    if isinstance(loss, str):
        return loss if loss == SUPERVISED else NAMED[loss]().describe()
    return (loss if isinstance(loss, Objective) else FromFunction(fn=loss)).describe()
