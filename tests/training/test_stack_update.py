"""The update of a stack: recorded in a CUDA graph it gives what it gives without one.

Here the recorded function is run again in place of a replay, with torch's fused AdamW for the CPU.
tests/gpu/test_training.py replays a real graph.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastlora.runtime import cuda_graph
from fastlora.runtime.cuda_graph import CUDAGraphed
from fastlora.runtime.tree import leaves
from fastlora.training.custom_optimizer import build, updates_begun
from fastlora.training.learner import make_learner
from fastlora.training.many.stack import RunStack, make_stack
from fastlora.training.many.update import StackUpdate
from fastlora.training.optimizers import step_together
from oracles.pairs import adapted
from oracles.training_runs import settings
from oracles.trees import relative_error, same_bits

ADAPTERS = (dict(r=2, target_modules=["q_proj", "up_proj"]), dict(r=4, target_modules=["q_proj"]))
RATES = ([1e-2, 3e-3], [2e-2, 0.0], [5e-3, 1e-2], [1e-3, 1e-3])


def made(base, *, graphed: bool) -> tuple[RunStack, StackUpdate]:
    learners = [
        make_learner(adapted(base, seed=i, **a), settings()) for i, a in enumerate(ADAPTERS)
    ]
    optimizers = [adamw(x.optimizer, fused=True) for x in learners]
    stack = make_stack(learners, settings())
    stack = replace(stack, graphed=graphed)
    return stack, StackUpdate(stack, optimizers)


def adamw(like: torch.optim.Optimizer, *, fused: bool) -> torch.optim.Optimizer:
    groups = [group | {"fused": fused} for group in like.param_groups]
    return torch.optim.AdamW(groups, lr=0.0, fused=fused)


def state(stack: RunStack, update: StackUpdate) -> list[Tensor]:
    own = [x for row in stack.own for x in row if x is not None]
    moments = [dict(o.state[x]) for o in update.optimizers for x in own if x in o.state]
    return [*stack.leaves, *own, *tree_leaves(moments)]


def replayed_by_running(stack: RunStack, update: StackUpdate):
    """A `_capture` whose replay runs the function again. Recording it changes nothing."""

    def capture(self, run):
        before = [x.clone() for x in state(stack, update)]
        results = tree_map(lambda x: torch.full_like(x, math.nan), run())
        for x, old in zip(state(stack, update), before, strict=True):
            x.copy_(old)

        def replay():
            for old, new in zip(leaves(results), leaves(run()), strict=True):
                old.copy_(new)

        return replay, results

    return capture


def step(stack: RunStack, update: StackUpdate, i: int):
    """Update i; at the third one, run 1 has a gradient that is not finite."""
    gen = torch.Generator().manual_seed(i)
    gradient = [torch.randn(x.shape, generator=gen) for x in stack.leaves]
    if i == 2:
        gradient[0][1, 0, 0] = math.inf
    ones, limits = torch.ones(2), torch.tensor([0.5, math.inf])
    return update(gradient, ones * (i + 1), ones, ones * 3, limits, RATES[i])


def test_a_recorded_update_equals_a_queued_one(base, monkeypatch):
    monkeypatch.setattr(cuda_graph, "_check_devices", lambda given: None)
    plain, recorded = made(base, graphed=False), made(base, graphed=True)
    monkeypatch.setattr(CUDAGraphed, "_capture", replayed_by_running(*recorded))
    for i in range(4):
        before = [x.clone() for row in recorded[0].own for x in row[1:] if x is not None]
        expected, found = step(*plain, i), step(*recorded, i)
        assert found.losses == expected.losses and found.norms == expected.norms
        assert same_bits(found.of_gradient, expected.of_gradient)
        # A rate is a float32 tensor in a graph and a Python number otherwise.
        assert relative_error(state(*recorded), state(*plain)) < 1e-6
        after = [x for row in recorded[0].own for x in row[1:] if x is not None]
        still = i == 2 or RATES[i][1] == 0.0
        assert same_bits(after, before) == still
        assert math.isinf(found.norms[1]) == (i == 2) and math.isfinite(found.norms[0])
    run = recorded[1].run
    assert isinstance(run, CUDAGraphed) and len(run.calls) == 1


def test_an_optimizer_that_waits_for_the_device_is_not_recorded(base):
    stack, update = made(base, graphed=True)
    slow = adamw(update.optimizers[1], fused=False)
    update = StackUpdate(stack, [update.optimizers[0], slow])
    assert not update.graphed and not isinstance(update.run, CUDAGraphed)


def test_losses_and_norms_are_read_once(base, monkeypatch):
    """Also if an optimizer waits for them before it writes."""
    reads, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: reads.append(x.shape) or tolist(x))
    for fused in (True, False):
        stack, update = made(base, graphed=False)
        optimizers = [update.optimizers[0], adamw(update.optimizers[1], fused=fused)]
        before, _ = [x.clone() for x in stack.leaves], reads.clear()
        found = step(stack, StackUpdate(stack, optimizers), 0)
        assert reads == [(2, 2)] and found.losses == pytest.approx([1 / 3, 1 / 3])
        assert bool((found.of_change > 0).any(0).all()) and not same_bits(stack.leaves, before)


def test_fused_optimizers_of_users_count_their_applied_updates(base):
    """A replay would not count on the host."""
    stack, update = made(base, graphed=False)
    make = partial(torch.optim.AdamW, lr=0.0, fused=True)
    users = [build(make, [dict(g) for g in x.param_groups]) for x in update.optimizers]
    update = StackUpdate(replace(stack, graphed=True), users)
    assert not update.graphed
    for i in range(3):
        step(stack, update, i)
    assert [*map(updates_begun, users)] == [3, 2]  # the gradient of run 1 was not finite once


def test_optimizers_are_capturable_only_while_a_graph_is_recorded(base, monkeypatch):
    """torch refuses to record others, and warns of these in steps that are not recorded."""
    stack, update = made(base, graphed=True)
    assert update.graphed
    seen: list[bool] = []
    for optimizer in update.optimizers:
        note = lambda opt, *_: seen.extend(group["capturable"] for group in opt.param_groups)
        optimizer.register_step_pre_hook(note)
    monkeypatch.setattr(cuda_graph, "_check_devices", lambda given: None)
    step(stack, update, 0)  # the first call runs plainly
    assert seen and not any(seen)
    seen.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock)
    monkeypatch.setattr(torch.cuda, "Stream", Mock)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    step_together(update.optimizers)
    assert seen and all(seen)
    assert not any(group["capturable"] for opt in update.optimizers for group in opt.param_groups)
