"""Learning rates by group, and the norms of each group in the record."""

import math

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer

import fastlora
from fastlora.formats.peft.names import named_leaves
from fastlora.training.learner import make_learner
from fastlora.training.loop import train
from fastlora.training.parameter_groups import group_of, rate_ratios
from oracles.training_runs import QUIET, ROWS, Killed, long_run, settings, stop_at, timeless
from oracles.trees import same_bits


@pytest.fixture(scope="module")
def all_groups(base):
    """Tensors of every group: LoRA, an embedding, norms, biases and magnitudes."""
    return fastlora.lora(
        base, r=2, target_modules=["q_proj", "embed_tokens"], use_dora=True,
        modules_to_save=["norm"], bias="none",
    )  # fmt: skip


def test_every_tensor_has_the_group_of_its_name(base):
    leaf, vector = torch.zeros(2, 2), torch.zeros(2)
    prefix = "base_model.model.model."
    expected = {
        "layers.0.self_attn.q_proj.lora_A.weight": "A",
        "layers.0.self_attn.q_proj.lora_B.weight": "B",
        "layers.0.self_attn.q_proj.lora_B.bias": "other",
        "layers.0.self_attn.q_proj.lora_magnitude_vector": "other",
        "layers.0.self_attn.q_proj.base_layer.bias": "other",
        "layers.0.mlp.down_proj.weight": "other",
        "layers.0.input_layernorm.weight": "norms",
        "layers.0.self_attn.q_norm.weight": "norms",
        "norm.weight": "norms",
        "embed_tokens.lora_embedding_A": "embeddings",
        "embed_tokens.lora_embedding_B": "embeddings",
        "embed_tokens.weight": "embeddings",
        "embed_tokens.token_adapter.trainable_tokens_delta": "embeddings",
    }
    shape = lambda name: vector if "norm" in name or "bias" in name else leaf
    assert {n: group_of(prefix + n, shape(n)) for n in expected} == expected
    assert group_of("base_model.model.lm_head.weight", leaf) == "embeddings"
    assert group_of("base_model.model.lm_head.lora_A.weight", leaf) == "A"


def test_the_rates_of_lora_plus_are_those_of_peft(folder, base, tokenizer, tmp_path):
    model = fastlora.lora(base, r=2, target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(tmp_path)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path), is_trainable=True)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-5
    )
    rate_of = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    expected = {
        name.replace(".default", ""): rate_of[id(p)]
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    leaves = named_leaves(model.adapter)
    ratios = rate_ratios(leaves, 1e-3, {"B": 16e-3, "embeddings": 1e-5})
    ours = {n: 1e-3 * ratio for n, ratio in zip(leaves, ratios, strict=True)}
    assert ours == pytest.approx(expected, rel=1e-12)


def test_a_group_moves_at_its_rate(model, tokenizer):
    """The first step of AdamW moves every element by the rate."""
    run = dict(max_steps=1, learning_rate=1e-3, max_grad_norm=None, **QUIET)
    trained, _ = train(model, tokenizer, ROWS, learning_rates={"B": 4e-3}, **run)
    before = named_leaves(model.adapter)
    for name, leaf in named_leaves(trained.adapter).items():
        moved = (leaf - before[name]).abs().median().item()
        assert moved == pytest.approx(4e-3 if "lora_B" in name else 1e-3, rel=1e-2), name


def test_norms_and_magnitudes_have_no_decay_at_any_rate(all_groups):
    given = settings(weight_decay=0.1, learning_rates={"B": 1e-3, "norms": 1e-5})
    learner = make_learner(all_groups, given)
    decay = {id(p): g["weight_decay"] for g in learner.optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(learner.leaves)
    for name, leaf in learner.leaves.items():
        assert decay[id(leaf)] == (0.1 if leaf.dim() > 1 else 0.0), name


def test_a_run_with_rates_by_group_resumes_with_the_same_bits(dropping, tokenizer, tmp_path):
    given = dict(learning_rates={"B": 5e-2})
    whole, history = long_run(dropping, tokenizer, tmp_path / "whole", **given)
    plain, _ = long_run(dropping, tokenizer, tmp_path / "plain")
    assert not same_bits(plain.adapter, whole.adapter)
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path / "cut", log=stop_at(4), **given)
    resumed, again = long_run(dropping, tokenizer, tmp_path / "cut", resume=True, **given)
    assert same_bits(resumed.adapter, whole.adapter) and timeless(again) == timeless(history)
    with pytest.raises(ValueError, match=r"learning_rates: .*0.05.* there, None now"):
        long_run(dropping, tokenizer, tmp_path / "cut", resume=True)


def test_the_norms_of_the_groups_add_up(all_groups, tokenizer):
    records: list[dict] = []
    run = dict(max_steps=2, learning_rate=1e-3, **QUIET)
    train(all_groups, tokenizer, ROWS, log=records.append, **run)
    groups = {"A", "B", "embeddings", "norms", "other"}
    for record in records:
        for kind in ("grad_norm", "update_norm"):
            assert {k.split("/")[1] for k in record if k.startswith(f"{kind}/")} == groups
        squares = [v**2 for k, v in record.items() if k.startswith("grad_norm/")]
        assert math.sqrt(sum(squares)) == pytest.approx(record["grad_norm"], rel=1e-5)
    one, _ = train(all_groups, tokenizer, ROWS, **run | dict(max_steps=1), lr_scheduler="constant")
    before, moved = named_leaves(all_groups.adapter), 0.0
    for name, leaf in named_leaves(one.adapter).items():
        if group_of(name, leaf) == "norms":
            moved += (leaf - before[name]).square().sum().item()
    assert math.sqrt(moved) == pytest.approx(records[0]["update_norm/norms"], rel=1e-5)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"C": 1.0}, "key 'C': expected B, embeddings, norms"),
        ({"B": 0}, r"learning_rates: B=0: expected a number in \(0"),
        ({"norms": "low"}, "norms='low'"),
        ({"B": 1e-3, "norms": 1e-3}, "a rate for 'norms', and the adapter trains no such tensor"),
    ],
)
def test_bad_rates_are_refused_by_group(model, tokenizer, rates, message):
    call = getattr(train, "__wrapped__", train)
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer, ROWS, learning_rates=rates, **QUIET)
