"""Runs that train experts, embeddings, heads and a grown vocabulary."""

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.model import Model
from fastlora.training.loop import train
from oracles.checkpoints import make_checkpoint
from oracles.pairs import adapted
from oracles.training_runs import QUIET, ROWS, Killed, long_run, stop_at
from oracles.trees import same_bits

# ── mixtures of experts ──


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Model:
    """LoRA on experts, router and attention, B not zero."""
    folder = tmp_path_factory.mktemp("mixture")
    make_checkpoint("qwen3_moe_mixed", folder, config=dict(vocab_size=4096))
    model, _ = fastlora.load(folder, max_seq_length=64, device="cpu")
    return adapted(model, r=2, target_modules="all-linear")


def test_every_leaf_of_a_mixture_is_trained(mixture, tokenizer):
    trained, history = train(mixture, tokenizer, ROWS, max_steps=6, learning_rate=1e-2, **QUIET)
    assert history.losses[-1] < history.losses[0]
    leaves = zip(tree_leaves(trained.adapter), tree_leaves(mixture.adapter), strict=True)
    assert all(not torch.equal(x, y) for x, y in leaves)


def test_a_resumed_mixture_is_the_same_run(mixture, tokenizer, tmp_path):
    how: dict[str, Any] = dict(max_steps=4, batch_size=2, learning_rate=1e-2, **QUIET)
    whole, _ = train(mixture, tokenizer, ROWS, output_dir=tmp_path, save_every=2, **how)
    resumed, _ = train(mixture, tokenizer, ROWS, resume=tmp_path / "checkpoint-2", **how)
    assert same_bits(resumed.adapter, whole.adapter)


# ── what is trained beside the projections ──


BESIDE = {
    "copies, norms, rows": dict(
        modules_to_save=["norm", "lm_head"], trainable_token_indices=[5, 9, 300]
    ),
    "LoRA on both ends": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_a_run_that_trains_more_than_projections_resumes(beside, base, tokenizer, tmp_path):
    model = adapted(base, **dict(r=2, target_modules=["q_proj"]) | BESIDE[beside])
    given = dict(eval_every=None, eval_data=None)
    whole, _ = long_run(model, tokenizer, tmp_path / "whole", **given)
    leaves = zip(tree_leaves(whole.adapter), tree_leaves(model.adapter), strict=True)
    assert all(not torch.equal(after, before) for after, before in leaves)
    with pytest.raises(Killed):
        long_run(model, tokenizer, tmp_path / "cut", log=stop_at(3), **given)
    resumed, _ = long_run(model, tokenizer, tmp_path / "cut", resume=True, **given)
    assert same_bits(resumed.adapter, whole.adapter)
    other = fastlora.lora(base, r=2, target_modules=["q_proj"], modules_to_save=["model.norm"])
    with pytest.raises(ValueError, match="tensors trained whole"):
        long_run(other, tokenizer, tmp_path / "cut", resume=True, **given)


def test_a_grown_vocabulary_is_trained_saved_and_resumed(base, tokenizer, tmp_path):
    model, grown, ids = fastlora.add_tokens(base, tokenizer, ["<think>", "</think>"])
    model = fastlora.lora(model, r=2, trainable_token_indices={"embed_tokens": ids, "lm_head": ids})
    rows = [{"prompt": r["prompt"], "completion": f"<think>{r['completion']}"} for r in ROWS]
    how = dict(max_steps=4, packing=False, learning_rate=1e-2, save_every=2, **QUIET)
    trained, _ = train(model, grown, rows, output_dir=tmp_path, **how)
    again = dict(resume=tmp_path / "checkpoint-2", output_dir=tmp_path / "again")
    resumed, _ = train(model, grown, rows, **again, **how)
    assert same_bits(resumed.adapter, trained.adapter)
    moved = trained.adapter["tokens"]["lm_head"] - model.adapter["tokens"]["lm_head"]
    assert moved[0].abs().max() > 1e-3
    grown.save_pretrained(tmp_path)
    again = fastlora.load_adapter(base, tmp_path)
    assert again.spec.config.vocab_size == 4098
    inputs = torch.tensor([grown.encode("<think>x</think>")])
    torch.testing.assert_close(again(inputs), trained(inputs), rtol=0, atol=0)
