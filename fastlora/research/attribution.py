"""The influence of training examples on the losses of target examples, from gradients.

One step on example z moves the adapter against its gradient, and changes the loss of a target z' to
first order by minus the step times an inner product of gradients. Summed over points of a run, with
learning rate e_i at point i and g the gradient of an example's loss:

    TracIn  (Pruthi et al. 2020, arXiv:2002.08484)   sum_i e_i <g_i(z'), g_i(z)>
    LESS    (Xia et al. 2024, arXiv:2402.04333)      sum_i e_i cos(g_i(z'), u_i(z))

u(z) is Adam's step for z: m / (sqrt(v) + eps), m = (b1 m_i + (1 - b1) g) / (1 - b1^(t + 1)), v
the same from squares, with the moments m_i, v_i after t updates. Positive values mean that training
on z lowers the loss of z'. Gradients are compared through count sketches of k numbers.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastlora.arguments import FUNCTION, argument_problems, instance, one_of, optional
from fastlora.errors import raise_problems
from fastlora.ops.dispatch import refuse_transforms
from fastlora.research.fisher import BATCHES
from fastlora.research.run_points import TrainingPoint
from fastlora.runtime.gradients import value_and_grad
from fastlora.runtime.per_example import Sketch

_BETAS, _EPS = (0.9, 0.999), 1e-8  # of `train`'s "adamw"
_SKETCH = Sketch(8192, 0)  # as many numbers as LESS projects to

Losses = Callable[[Any, Any], Float[Tensor, "b"]]


def influence(
    fn: Losses,
    points: Sequence[TrainingPoint],
    data: Iterable[Any],
    targets: Iterable[Any],
    *,
    method: str = "less",
    sketch: Sketch | None = _SKETCH,
) -> Float[Tensor, "n m"]:
    """The influence of each of n training examples on each of m targets, in at least float32.

    To choose data for a task, give some of its examples as targets and take the rows with the
    largest mean over them: `scores.mean(1).topk(k).indices`.

    "less" holds the gradients of one batch of `data` at a time; everything else is sketched in the
    backward pass.

    Args:
        fn: (adapter, batch) -> [b], the loss of each example, such as its mean over tokens:
            `total / tokens.clamp(min=1)` of `FL.row_losses`. It gets what
            `value_and_grad(per_example=...)` passes, and may only give it to functions of
            `fastlora.functional`.
        points: see `training_points`; `TrainingPoint(adapter=model.adapter, learning_rate=1.0)` is
            enough for "tracin" at one point.
        data: batches of training examples.
        targets: batches of target examples.
        method: "less" or "tracin".
        sketch: of the gradients; a larger k is more accurate. None compares whole gradients, and
            holds those of all examples.

    Raises:
        ValueError: an argument is wrong, "less" is asked for at a point without moments, or a
            gradient is NaN or infinite.
        RuntimeError: a torch.func transform is active.
    """
    refuse_transforms("research.influence")
    rules = {
        "fn": (fn, FUNCTION), "data": (data, BATCHES), "targets": (targets, BATCHES),
        "method": (method, one_of("less", "tracin")),
        "sketch": (sketch, optional(instance(Sketch, "a fastlora.Sketch"))),
    }  # fmt: skip
    problems = argument_problems(rules) + _point_problems(points, method)
    raise_problems(ValueError, "research.influence cannot use these arguments:", problems)
    batches, target_batches = list(data), list(targets)
    if not batches or not target_batches:
        raise ValueError("research.influence: data and targets need at least one batch each.")
    total = None
    for point in points:
        ours = _vectors(fn, point, batches, sketch, adam=method == "less")
        theirs = _vectors(fn, point, target_batches, sketch, adam=False)
        _check_finite(data=ours, targets=theirs)
        if method == "less":
            ours, theirs = _unit(ours), _unit(theirs)
        scores = point.learning_rate * (ours @ theirs.T)
        total = scores if total is None else total + scores
    assert total is not None
    return total


def _point_problems(points: Any, method: Any) -> list[str]:
    are_points = isinstance(points, Sequence) and all(isinstance(p, TrainingPoint) for p in points)
    if not are_points or not points:
        return ["points: expected a list of TrainingPoint, the result of research.training_points"]
    unknown = [i for i, p in enumerate(points) if p.exp_avg is None or p.exp_avg_sq is None]
    if method == "less" and unknown:
        return [
            f"points {unknown} have no moments of Adam, which 'less' needs; train with"
            " optimizer='adamw', or pass method='tracin'"
        ]
    return []


def _vectors(
    fn: Losses, point: TrainingPoint, batches: Sequence[Any], sketch: Sketch | None, adam: bool
) -> Float[Tensor, "n k"]:
    """One vector for each example: its gradient or Adam's step, whole or sketched."""
    # The step is not linear in the gradient, so it is sketched after the backward pass.
    exact = adam or sketch is None
    how: Any = True if exact else sketch
    run = value_and_grad(fn, per_example=how)
    rows = []
    for batch in batches:
        _, found = run(point.adapter, batch)
        if exact:
            steps = _adam_steps(point, found) if adam else found
            found = _flat(steps) if sketch is None else sketch.of(steps)
        rows.append(found)
    return torch.cat(rows)


def _check_finite(**vectors: Float[Tensor, "_ k"]) -> None:
    # Otherwise topk would choose these rows first: it sorts NaN above all numbers.
    problems = [
        f"{name}: examples {wrong[:10]}"
        for name, x in vectors.items()
        if (wrong := (~x.isfinite().all(1)).nonzero().flatten().tolist())
    ]
    heading = "research.influence: these gradients are NaN or infinite:"
    cure = (
        "An example may have no trained tokens: divide its loss by tokens.clamp(min=1), not by"
        " tokens."
    )
    raise_problems(ValueError, heading, problems, cure)


def _adam_steps(point: TrainingPoint, grads: Any) -> Any:
    """Adam's step for each example, without the learning rate; leaves [b, ...]."""
    t, (b1, b2) = point.step + 1, _BETAS

    def step(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        m = (b1 * m + (1 - b1) * g) / (1 - b1**t)
        v = (b2 * v + (1 - b2) * g.square()) / (1 - b2**t)
        return m / (v.sqrt() + _EPS)

    return tree_map(step, grads, point.exp_avg, point.exp_avg_sq)


def _flat(tree: Any) -> Float[Tensor, "b p"]:
    wide = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.cat([wide(x).flatten(1) for x in tree_leaves(tree)], 1)


def _unit(x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    return x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
