"""The optimisers of train(): those of other libraries, step by step, and their state out and in."""

import bitsandbytes
import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.checkpoints import tensors
from fastlora.errors import CheckpointError
from fastlora.training.optimizers import (
    fresh_state,
    make_optimizer,
    optimizer_problems,
    restore_state,
    state_tensors,
    steps_taken,
    update,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["adamw", "adamw_8bit", *(["paged_adamw_8bit"] if DEVICE == "cuda" else [])]
SHAPES = [(16, 300), (8, 3), (130, 64)]  # of 8-bit state, of 32-bit state, of a part of a block


def leaves(seed: int = 0) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=gen).to(DEVICE) for shape in SHAPES]


def step(optimizer: torch.optim.Optimizer, params: list[torch.Tensor], seed: int) -> None:
    optimizer.param_groups[0]["lr"] = 1e-2
    for param, grad in zip(params, leaves(seed), strict=True):
        param.grad = grad
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_those_of_the_library(name):
    ours, theirs = leaves(), leaves()
    other = {
        "adamw": lambda: torch.optim.AdamW(theirs, lr=0.0, weight_decay=0.1),
        "adamw_8bit": lambda: bitsandbytes.optim.AdamW8bit(theirs, lr=0.0, weight_decay=0.1),
        "paged_adamw_8bit": lambda: bitsandbytes.optim.AdamW8bit(theirs, lr=0.0, weight_decay=0.1),
    }[name]()
    optimizer = make_optimizer(name, ours, 0.1)
    for seed in range(1, 5):
        step(optimizer, ours, seed)
        step(other, theirs, seed)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if name == "adamw" else 0)
    narrow = [state_tensors(optimizer, x).get("state1") for x in ours]
    kinds = [None if x is None else x.dtype for x in narrow]
    assert kinds == ([None] * 3 if name == "adamw" else [torch.uint8, torch.float32, torch.uint8])


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_state_continues_with_the_same_bits(name):
    params = leaves()
    optimizer = make_optimizer(name, params, 0.1)
    for seed in (1, 2):
        step(optimizer, params, seed)
    saved = [{k: v.cpu().clone() for k, v in state_tensors(optimizer, p).items()} for p in params]
    again = [p.clone() for p in params]
    other = make_optimizer(name, again, 0.1)
    for param, state in zip(again, saved, strict=True):
        fresh = fresh_state(other, param)
        assert {k: (v.shape, v.dtype) for k, v in fresh.items()} == {
            k: (v.shape, v.dtype) for k, v in state.items()
        }
        restore_state(other, param, state)
    for seed in (3, 4):
        step(optimizer, params, seed)
        step(other, again, seed)
    assert all(map(torch.equal, params, again))


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_leaves_vectors_alone(name):
    """A norm, a bias or a magnitude beside two matrices; its gradient is 0."""
    matrix, vector, other = (torch.ones(shape, device=DEVICE) for shape in ((3, 2), 5, (2, 3)))
    optimizer = make_optimizer(name, [matrix, vector, other], 0.5)
    for leaf in (matrix, vector, other):
        fresh_state(optimizer, leaf)
        leaf.grad = torch.zeros_like(leaf)
    assert update(optimizer, 0.1, torch.ones(()), torch.ones(())) == (1.0, 1.0)
    assert torch.equal(vector, torch.ones_like(vector))
    for leaf in (matrix, other):
        torch.testing.assert_close(leaf, torch.full_like(leaf, 1 - 0.1 * 0.5))
    assert [steps_taken(optimizer, leaf) for leaf in (matrix, vector, other)] == [1, 1, 1]


@pytest.mark.parametrize("name", [*NAMES, "fused"])
@pytest.mark.parametrize("broken", ["loss", "norm"])
def test_an_update_that_is_not_finite_changes_no_bit(name, broken):
    params = leaves()
    if name == "fused":  # as on CUDA
        optimizer = torch.optim.AdamW(params, lr=0.0, weight_decay=0.1, fused=True)
    else:
        optimizer = make_optimizer(name, params, 0.1)
    figures = {"loss": torch.ones(()), "norm": torch.ones(())}
    for param, grad in zip(params, leaves(1), strict=True):
        param.grad = grad
    update(optimizer, 1e-2, *figures.values())
    copies = lambda: [x.clone() for p in params for x in (p, *state_tensors(optimizer, p).values())]
    before = copies()
    for param, grad in zip(params, leaves(2), strict=True):
        param.grad = grad
    figures[broken] = torch.tensor(torch.inf)
    assert torch.inf in update(optimizer, 1e-2, *figures.values())
    assert all(map(torch.equal, before, copies()))
    assert all(param.grad is None for param in params)


def test_tensors_that_an_optimizer_cannot_train_are_reported():
    params = [torch.zeros(2), torch.zeros(2, dtype=torch.float64)]
    assert optimizer_problems("adamw", params) == []
    assert len(optimizer_problems("adamw_8bit", params)) == 1
    assert len(optimizer_problems("paged_adamw_8bit", params)) == 2


ROWS = [{"text": f"def f{n}(x): return x + {n}"} for n in range(8)]


def test_a_run_with_8_bit_moments_resumes_with_the_same_bits(tmp_path):
    model, tokenizer = fastlora.load("demo", max_seq_length=32, device=DEVICE)
    model = fastlora.lora(model, r=32, target_modules=["q_proj", "down_proj"])
    how = dict(
        optimizer="adamw_8bit", batch_size=2, learning_rate=5e-3, packing=False, progress=False
    )
    run = lambda folder, **more: fastlora.train(
        model, tokenizer, ROWS, output_dir=folder, save_every=2, lr_scheduler="constant",
        warmup_ratio=0.0, **how, **more,
    )  # fmt: skip
    whole, history = run(tmp_path / "whole", max_steps=4)
    run(tmp_path / "parts", max_steps=2)
    resumed, again = run(tmp_path / "parts", max_steps=4, resume=True)
    assert again.losses == history.losses and history.losses[-1] < history.losses[0]
    pairs = zip(tree_leaves(whole.adapter), tree_leaves(resumed.adapter), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    state = tensors.read_safetensors(tmp_path / "parts/checkpoint-4/optimizer.safetensors")
    assert {x.dtype for k, x in state.items() if "state1" in k} == {torch.uint8}
    plain, _ = fastlora.train(
        model, tokenizer, ROWS, max_steps=4, lr_scheduler="constant", warmup_ratio=0.0,
        **how | dict(optimizer="adamw"),
    )  # fmt: skip
    difference = [
        (a - b).abs().max()
        for a, b in zip(tree_leaves(plain.adapter), tree_leaves(whole.adapter), strict=True)
    ]
    assert 0 < max(difference) < 1e-2  # of 2e-2 that four steps of 5e-3 can go


def test_another_optimizers_checkpoint_is_refused(tmp_path):
    model, tokenizer = fastlora.load("demo", max_seq_length=32, device=DEVICE)
    model = fastlora.lora(model, r=32, target_modules=["q_proj"])
    run = lambda **more: fastlora.train(
        model, tokenizer, ROWS, output_dir=tmp_path, save_every=1, max_steps=1, batch_size=2,
        packing=False, progress=False, **more,
    )  # fmt: skip
    run()
    with pytest.raises((ValueError, CheckpointError), match="optimizer"):
        run(optimizer="adamw_8bit", resume=True)
