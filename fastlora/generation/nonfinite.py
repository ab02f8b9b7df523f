"""The error of a row whose logits are NaN or infinite. It names the tensor that they come from."""

from torch.utils._pytree import tree_flatten_with_path

from fastlora.models.names import tensors_from_base
from fastlora.models.params import first_nonfinite
from fastlora.models.state import ModelState


class NonFiniteLogits(FloatingPointError):
    """A row has no finite score for its next token. The row is released; other rows go on."""

    def __init__(self, message: str, slot: int) -> None:
        super().__init__(message)
        self.slot = slot


def explanation(model: ModelState, slot: int, made: int, largest: float) -> str:
    """The message for a row with `made` new tokens, whose largest logit for the next is given."""
    return (
        f"Model.generate: after {made} new tokens the largest logit of row {slot} is {largest}. "
        f"{_first_non_finite(model)}"
    )


def _first_non_finite(model: ModelState) -> str:
    base = tensors_from_base(model.spec.config, model.base)
    paths = tree_flatten_with_path(model.adapter)[0]
    adapter = {"".join(map(str, path)): leaf for path, leaf in paths}
    for owner, tensors in (("base", base), ("adapter", adapter)):
        if (name := first_nonfinite(tensors)) is not None:
            return f"The {owner}'s tensor {name} holds NaN or infinity; load it again."
    dtype = str(model.base["norm"].dtype).removeprefix("torch.")
    return f"All weights are finite: an activation overflows {dtype}. Load in a wider dtype."
