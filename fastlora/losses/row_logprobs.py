"""row_logprobs(): the log-probability of each row of a batch, and its number of tokens."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from fastlora.errors import raise_problems
from fastlora.functional import AnyAdapter, token_logprobs, trained_labels
from fastlora.models.input_checks import entry_problems
from fastlora.models.params import Base
from fastlora.models.spec import Spec
from fastlora.models.state import Batch, Seed
from fastlora.ops.loss.ignore import IGNORE


def batch_logprobs(
    function: str,
    adapter: AnyAdapter,
    base: Base,
    spec: Spec,
    batch: Batch,
    seed: Seed,
) -> tuple[Float[Tensor, "b t"], Int[Tensor, "b t"]]:
    """(log-probabilities of a batch's labels, the labels; -100 at the start of every document).

    Raises:
        ValueError: names `function`; as `row_logprobs`.
    """
    # First, because token_logprobs reads the batch's input_ids.
    raise_problems(ValueError, f"{function} cannot use this batch:", entry_problems(batch))
    labels = trained_labels(batch)
    names = ("attention_mask", "position_ids", "segment_ids")
    optional: dict[str, Any] = {name: batch.get(name) for name in names}
    args = (adapter, base, spec, batch["input_ids"], labels)
    return token_logprobs(*args, seed=seed, **optional), labels


def row_logprobs(
    adapter: AnyAdapter, base: Base, spec: Spec, batch: Batch, *, seed: Seed = None
) -> tuple[Float[Tensor, "b"], Int[Tensor, "b"]]:
    """(sum of log p over the trained tokens of each row, their number). Their quotient is the mean.

    The sums are float32 or wider and differentiable in `adapter`.

    Args:
        adapter: the trained tensors; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        batch: "input_ids", "labels", and optionally the masks and ids of `functional.forward`.
        seed: of the LoRA dropout masks; None: without dropout.

    Raises:
        ValueError: as `functional.token_logprobs`, and for missing or unknown entries of the batch.
    """
    logps, labels = batch_logprobs("losses.row_logprobs", adapter, base, spec, batch, seed)
    return logps.sum(1), (labels[:, 1:] != IGNORE).sum(1)
