"""scripts/grpo.py: the policy learns a reward that can be checked, with every kind of loss."""

import json
import sys

import grpo
import numpy as np
import pytest
import torch

import fastlora
from fastlora import functional as FL
from fastlora.data.rows import read_rows
from fastlora.generation.many import Completion
from oracles import losses as papers
from oracles.trees import randomised


@pytest.fixture(scope="module")
def demo():
    base, tokenizer = fastlora.load("demo", dtype="float32", max_seq_length=128, device="cpu")
    rows = read_rows(grpo.DEMO / "heldout.jsonl")[:4]
    return fastlora.lora(base, r=4), tokenizer, [row["messages"][:-1] for row in rows]


def odd(prompt, reply) -> float:
    """The share of odd ids: 0.48 on the demo."""
    return sum(i % 2 for i in reply.ids) / len(reply.ids)


def test_the_reward_rises(demo):
    settings = grpo.Settings(
        steps=4, prompts_per_step=2, num_generations=8, max_completion_length=4, learning_rate=2e-2
    )
    rewards = [reward for _, reward in grpo.improve(*demo, odd, settings)]
    assert np.mean(rewards[-2:]) > rewards[0] + 0.15


@pytest.mark.parametrize("loss_type", grpo.KINDS)
def test_each_kind_is_the_papers(loss_type, demo):
    """Advantages, clipping at ratios off 1, and the divergence from the start."""
    model, tokenizer, chats = demo
    settings = grpo.Settings(
        loss_type=loss_type, num_generations=4, max_completion_length=5, beta=0.04
    )
    replies = grpo.sample(model, tokenizer, chats[:2], settings, seed=1)
    rewards = [0.0, 1.0, 0.5, 0.0, 1.0, 0.0, 0.0, 0.0]
    batch = grpo.policy_batch(tokenizer, chats[:2], replies, rewards, settings)
    groups = torch.tensor(rewards).view(2, 4)
    wanted = groups - groups.mean(1, keepdim=True)
    if loss_type != "dr_grpo":
        wanted = wanted / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"], wanted.flatten())
    policy = randomised(model.adapter, seed=2, std=0.02)
    value = grpo.policy_loss(policy, model, batch, settings, model.adapter)
    logps, ref = (
        FL.token_logprobs(
            adapter, model.base, model.spec, batch["input_ids"], batch["labels"],
            attention_mask=batch["attention_mask"],
        )
        for adapter in (policy, model.adapter)
    )  # fmt: skip
    mask = batch["labels"] != -100
    ratio = (logps - batch["old_logps"]).exp()[mask]
    assert ratio.min() < 0.8 and ratio.max() > 1.28
    expected = papers.grpo(
        logps, batch["old_logps"], wanted.flatten(), mask, loss_type=loss_type, epsilon=0.2,
        epsilon_high=0.28 if loss_type == "dapo" else 0.2, beta=0.04, ref_logps=ref,
        num_items_in_batch=mask.sum(), max_completion_length=5,
    )  # fmt: skip
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_samples_have_the_policys_log_probabilities_and_ratio_1(demo):
    """Those of generate_many, through a cache, are those of a forward pass."""
    model, tokenizer, chats = demo
    settings = grpo.Settings(num_generations=3, max_completion_length=6)
    replies = grpo.sample(model, tokenizer, chats, settings, seed=5)
    assert [(r.index, r.sample) for r in replies] == [(i, j) for i in range(4) for j in range(3)]
    rewards = [odd(None, r) for r in replies]
    batch = grpo.policy_batch(tokenizer, chats, replies, rewards, settings)
    sampled = batch["labels"] != -100
    assert sampled.sum() == sum(len(r.ids) for r in replies)
    logps = FL.token_logprobs(
        model.adapter, model.base, model.spec, batch["input_ids"], batch["labels"],
        attention_mask=batch["attention_mask"],
    )  # fmt: skip
    torch.testing.assert_close(logps[sampled], batch["old_logps"][sampled], rtol=1e-4, atol=1e-4)
    groups = batch["advantages"].view(4, 3)
    torch.testing.assert_close(groups.sum(1), torch.zeros(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "reason", "wanted"),
    [
        ("Read a text file.", "stop", 1.0),
        ("read the text.", "stop", 1 / 2),
        ("Read. The text.", "stop", 1 / 2),
        ("A file.", "stop", 1 / 2),
        ("Read read.", "stop", 1 / 2 + 1 / 8),
        ("a file", "stop", 0.0),
        ("Read a text", "length", 0.0),
        ("", "stop", 0.0),
    ],
)
def test_the_reward_is_form_and_words(text, reason, wanted):
    reply = Completion(index=0, sample=0, ids=[], text=text, logprobs=None, finish_reason=reason)
    prompt = [{"role": "user", "content": "class A:\n  def read_text(self):"}]
    assert grpo.reward(prompt, reply) == wanted


@pytest.mark.parametrize("warmup_steps", ["0", "1"])
def test_the_script_runs_to_its_end(warmup_steps, tmp_path, monkeypatch, capsys):
    arguments = ["--steps", "2", "--warmup-steps", warmup_steps, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *arguments])
    small = dict(prompts_per_step=2, num_generations=2, max_completion_length=3)
    original = grpo.Settings
    monkeypatch.setattr(grpo, "Settings", lambda **s: original(**s | small))
    monkeypatch.setattr(grpo, "HELDOUT", 2)
    monkeypatch.setattr(grpo, "read_rows", lambda path: read_rows(path)[:32])
    grpo.main()
    written = json.loads((tmp_path / "rewards.json").read_text())
    assert len(written["rewards"]) == 2 and {*written["heldout"]} == {"before", "after"}
    assert (tmp_path / "rewards.png").stat().st_size > 1000
    assert "held-out reward" in capsys.readouterr().out
    base, _ = fastlora.load("demo", dtype="float32", device="cpu")
    fastlora.load_adapter(base, tmp_path)
