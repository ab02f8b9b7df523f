"""Learner: the adapter that a run trains, with its optimizer and its gradient function."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora.formats.peft.names import named_leaves
from fastlora.functional import loss_sum
from fastlora.losses.objectives import Objective
from fastlora.models.names import linear_names, projection_shape
from fastlora.models.params import Adapter, Base
from fastlora.models.spec import Extras, Spec
from fastlora.models.state import Batch, Seed, StateT, require_adapter
from fastlora.ops.attention.context_group import ContextGroup
from fastlora.runtime.gradients import value_and_grad
from fastlora.runtime.layer_fetching import is_sharded
from fastlora.training.optimizers import make_optimizer
from fastlora.training.parameter_groups import rate_ratios
from fastlora.training.private_checks import warn_of_noise
from fastlora.training.private_step import row_means
from fastlora.training.settings import Settings


@dataclass(frozen=True, slots=True, eq=False)
class Learner(Generic[StateT]):
    """The model being trained (its adapter is a private copy), its optimizer and its gradient."""

    model: StateT
    leaves: dict[str, Tensor]  # PEFT's tensor name -> leaf of the model's adapter
    optimizer: torch.optim.Optimizer
    # micro_batch_loss and its gradient; of a private run, row_means and its gradient by example.
    loss_and_grad: Callable[..., tuple[Tensor, Adapter]]
    neftune_alpha: float | None = None

    @property
    def spec(self) -> Spec:
        """The model's spec with the noise of NEFTune, which the trained model must not keep."""
        if self.neftune_alpha is None:
            return self.model.spec
        return replace(self.model.spec, neftune_alpha=self.neftune_alpha)


def make_learner(
    model: StateT,
    settings: Settings,
    objective: Objective | None = None,
    context: ContextGroup | None = None,
) -> Learner[StateT]:
    """A learner over copies of the adapter's tensors; the given model is not written to.

    Args:
        model: with an adapter.
        settings: of the run.
        objective: what is minimised; None: the mean of -log p.
        context: the ranks that have rows together with this one; None: rows are whole.
    """
    _, adapter = require_adapter(model)
    # Copies: the optimizer updates its tensors in place.
    copies = tree_map(lambda x: x.detach().clone(), adapter)
    # In this order everywhere: the gradient's norm is rounded in the order of its terms.
    leaves = named_leaves(copies)
    ratios = rate_ratios(leaves, settings.learning_rate, settings.learning_rates)
    optimizer = make_optimizer(
        settings.optimizer, list(leaves.values()), settings.weight_decay, ratios
    )
    device = model.base["norm"].device.type
    cuda_graph = not is_sharded(model.base) and should_use_cuda_graph(model.spec, device, settings)
    if settings.clip_per_example is not None:
        warn_of_noise(settings, model)
        loss_and_grad = value_and_grad(row_means, per_example=True)
    elif objective is None:
        of_batch = micro_batch_loss
        if context is not None:
            of_batch = partial(micro_batch_loss, context=context)
        loss_and_grad = value_and_grad(of_batch, cuda_graph=cuda_graph)
    else:
        loss_and_grad = value_and_grad(partial(micro_batch_loss, objective=objective))
    trained = replace(model, adapter=copies)
    return Learner(trained, leaves, optimizer, loss_and_grad, settings.neftune_alpha)


def micro_batch_loss(
    adapter: Adapter,
    base: Base,
    spec: Spec,
    batch: Batch,
    scale: Float[Tensor, ""],
    seed: Seed,
    first_row: Int[Tensor, ""] | None = None,
    context: ContextGroup | None = None,
    objective: Objective | None = None,
) -> Float[Tensor, ""]:
    """The sum of -log p over a micro-batch's trained tokens, or the sum that `objective` takes over
    its items, times `scale`. `first_row` and `context` are those of `loss_sum`; objectives do not
    take them.

    The mean over the step's tokens is taken after the backward pass: the gradient of a mean over
    131,072 tokens is so small that float16 would lose its digits.
    """
    if objective is not None:
        return objective.loss_sum(adapter, base, spec, batch, seed) * scale
    how: dict[str, Any] = dict(seed=seed, first_row=first_row, context=context)
    return loss_sum(adapter, base, spec, batch, **how)[0] * scale


# Parameters of a layer times tokens of a micro-batch. Below this the GPU may wait for the host: on
# some H200 machines it took 6 to 8 ms to launch a layer's kernels, forward and backward. A step of
# 1B over 4 x 2048 tokens (5.0e11) has 87 ms of kernels in bf16; launched one by one they took 94,
# 115 and 126 ms, and over fp8 154 ms, in a graph 77. A step of 8 layers of 8B in NF4 over 2 x 2048
# tokens (8.9e11) takes 106 ms with "offload", in a graph 88. Keys in scripts/bench/results.jsonl:
# h200-profile-1b-2026-11-30, h200-stream-1b-2026-11-30, fp8-losses-1b-2026-11-30,
# fp8-losses-1b-graph-2026-11-30, nf4-offload-graph-2026-11-30.
_GRAPH_LIMIT_OPERATIONS = 9e11


def should_use_cuda_graph(
    spec: Spec, device: str, settings: Settings, stacked: bool = False
) -> bool:
    """Whether to replay micro-batches from a CUDA graph.

    True for small micro-batches of one shape. A model whose code waits for the GPU cannot be
    recorded: the loop over experts does, and so do trained rows.

    Args:
        spec: of the model or the stack.
        device: type of the base's device.
        settings: of the run, or with the batch size of all runs of a stack.
        stacked: of a stack. With "offload" it is not recorded, because that has not been measured.
    """
    # Without packing, lengths differ from batch to batch.
    if device != "cuda" or not settings.packing:
        return False
    if stacked and spec.recompute == "offload":
        return False
    if settings.context_parallel > 1:  # a recorded step does not send
        return False
    if any(spec.config.sparse_layers) or spec.extras != Extras() or spec.qat_scheme is not None:
        return False
    names = linear_names(spec.config)
    layer = sum(rows * d for rows, d in (projection_shape(spec.config, n) for n in names))
    return settings.batch_size * spec.max_seq_length * layer < _GRAPH_LIMIT_OPERATIONS
