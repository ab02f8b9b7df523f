"""RunStack: the adapters of several runs as one stack, and the losses and gradients of a pass.

Each run keeps its leaves, in its rank, and its optimizer (`Learner`). The stack is a copy of them,
filled up with zeros, that is refreshed after each update. So every optimizer gets the tensors that
it gets in a single run: 8-bit moments have the same blocks, optimizers of users the same shapes,
and a run's checkpoint is that of a single run. The copy takes the memory of one more adapter for
each run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.formats.peft.names import named_leaves
from fastlora.functional import trained_labels
from fastlora.models.each_row import Inputs
from fastlora.models.outputs import row_logprobs
from fastlora.models.params import Adapter, Base
from fastlora.models.spec import Spec
from fastlora.models.stacking import stack
from fastlora.models.stacks import stack_rows
from fastlora.models.state import Batch, require_adapter
from fastlora.runtime.gradients import value_and_grad
from fastlora.training.learner import Learner, should_use_cuda_graph
from fastlora.training.parameter_groups import group_of
from fastlora.training.settings import Settings


@dataclass(frozen=True, slots=True, eq=False)
class RunStack:
    """The adapters of n runs in one tree. Make a new one when a run ends."""

    adapters: Adapter
    spec: Spec
    base: Base
    leaves: list[Tensor]  # of `adapters`, each [n, ...]
    groups: list[str]  # of each leaf: "A" or "B"
    own: list[list[Tensor | None]]  # of each leaf: each run's tensor; None: it has no such target
    copies: tuple[list[Tensor], list[Tensor]]  # views of `leaves`, and the runs' tensors
    loss_and_grad: Callable[..., tuple[Tensor, dict[str, Any]]]  # stack_loss and its gradient
    graphed: bool  # whether loss_and_grad is replayed from a CUDA graph

    @property
    def n(self) -> int:
        """The number of runs."""
        return self.leaves[0].shape[0]

    def parts(self, leaves: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """For each of some tensors like `leaves`, views of each run's part in its own rank."""
        return _parts(leaves, self.own)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the runs' tensors into the stack."""
        # A few launches for all of them; each tensor alone would be thousands.
        torch._foreach_copy_(*self.copies)  # pyright: ignore[reportPrivateImportUsage]


def _parts(
    leaves: Sequence[Tensor], own: Sequence[Sequence[Tensor | None]]
) -> list[list[Tensor | None]]:
    return [
        [None if x is None else _part(y, x) for y, x in zip(leaf.unbind(), of_leaf, strict=True)]
        for leaf, of_leaf in zip(leaves, own, strict=True)
    ]


def _part(padded: Tensor, own: Tensor) -> Tensor:
    """The part of a run's slice that is not padding."""
    return padded if padded.shape == own.shape else padded[tuple(map(slice, own.shape))]


def make_stack(learners: Sequence[Learner], settings: Settings) -> RunStack:
    """The stack of these runs' adapters.

    Args:
        learners: of the runs, over one base.
        settings: of any of them; only those are read that all runs share.

    Raises:
        ValueError: as `functional.stack`.
    """
    adapters, spec = stack([learner.model for learner in learners])
    spec = replace(spec, neftune_alpha=learners[0].neftune_alpha)
    names = named_leaves(adapters)
    own: list[list[Tensor | None]] = []
    for i, layer in enumerate(adapters["layers"]):
        for name in layer:
            records = [_record(learner, i, name) for learner in learners]
            own += [[None if x is None else getattr(x, f) for x in records] for f in ("a", "b")]
    base = learners[0].model.base
    # All rows of the pass count, as those of one run's larger batch.
    size = replace(settings, batch_size=settings.batch_size * len(learners))
    graphed = should_use_cuda_graph(spec, base["norm"].device.type, size, stacked=True)
    # Made once: thousands of views would take milliseconds in each step.
    views, tensors = (
        [x for row in rows for x in row if x is not None]
        for rows in (_parts([*names.values()], own), own)
    )
    return RunStack(
        adapters,
        spec,
        base,
        [*names.values()],
        [group_of(name, leaf) for name, leaf in names.items()],
        own,
        (views, tensors),
        value_and_grad(stack_loss, cuda_graph=graphed),
        graphed,
    )


def _record(learner: Learner, layer: int, name: str) -> Any:
    return require_adapter(learner.model)[1]["layers"][layer].get(name)


def stack_loss(
    trained: dict[str, Any],
    base: Base,
    spec: Spec,
    batch: Batch,
    widths: Int[Tensor, "n"] | None,
    seeds: Int[Tensor, "n"] | None,
) -> Float[Tensor, ""]:
    """The sum over all runs of a run's weight times the sum of -log p over its trained tokens.

    The gradient by the weights is each run's sum, so that one pass gives it too, and a recorded one
    as well.

    Args:
        trained: "adapters", a stack; "weights" [n], by which the gradients are scaled.
        base: frozen weights.
        spec: of the stack.
        batch: equally many rows of each run, those of run 0 first.
        widths: tokens of a row in each run's own batch; None: those of this one.
        seeds: of the dropout masks and the noise of each run; None: without both.
    """
    sums = run_losses(
        trained["adapters"], base, spec, batch, len(trained["weights"]), widths, seeds
    )
    return (trained["weights"] * sums).sum()


def run_losses(
    adapters: Adapter,
    base: Base,
    spec: Spec,
    batch: Batch,
    n: int,
    widths: Int[Tensor, "n"] | None = None,
    seeds: Int[Tensor, "n"] | None = None,
) -> Float[Tensor, "n"]:
    """The sum of -log p over each run's trained tokens; the arguments are those of `stack_loss`."""
    ids = batch["input_ids"]
    rows = stack_rows(None, n, ids)._replace(widths=widths)
    inputs: Inputs = {**batch, "labels": trained_labels(batch)}
    logp = row_logprobs(adapters, base, spec, inputs, seeds, rows=rows)
    return -logp.view(n, -1).sum(1)
