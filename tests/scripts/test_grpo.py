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


@pytest.fixture(scope="module")
def demo():
    base, tokenizer = fastlora.load("demo", dtype="float32", max_seq_length=128, device="cpu")
    rows = read_rows(grpo.DEMO / "heldout.jsonl")[:4]
    return fastlora.lora(base, r=4), tokenizer, [row["messages"][:-1] for row in rows]


def odd(prompt, reply) -> float:
    """The share of odd ids: 0.48 on the demo."""
    return sum(i % 2 for i in reply.ids) / len(reply.ids)


@pytest.mark.parametrize("loss_type", grpo.KINDS)
def test_the_reward_rises(loss_type, demo):
    settings = grpo.Settings(
        loss_type=loss_type, steps=5, prompts_per_step=2, num_generations=6,
        max_completion_length=5, num_iterations=3, learning_rate=1e-2,
    )  # fmt: skip
    rewards = [reward for _, reward in grpo.improve(*demo, odd, settings)]
    assert np.mean(rewards[-2:]) > rewards[0] + 0.15


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


def test_a_divergence_from_the_start_keeps_the_policy_near_it(demo):
    moved = []
    for beta in (0.0, 1e3):
        settings = grpo.Settings(
            steps=3, prompts_per_step=2, num_generations=4, max_completion_length=4,
            num_iterations=4, learning_rate=1e-2, beta=beta,
        )  # fmt: skip
        *_, (last, _) = grpo.improve(*demo, odd, settings)
        with torch.no_grad():
            ids = torch.tensor([demo[1].encode("def f(x):")])
            moved.append((last(ids) - demo[0](ids)).abs().max().item())
    assert moved[1] < 0.5 * moved[0]


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


def test_the_script_runs_to_its_end(tmp_path, monkeypatch, capsys):
    arguments = ["--steps", "2", "--warmup-steps", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *arguments])
    small = dict(prompts_per_step=2, num_generations=2, max_completion_length=3)
    original = grpo.Settings
    monkeypatch.setattr(grpo, "Settings", lambda **s: original(**s | small))
    monkeypatch.setattr(grpo, "HELDOUT", 2)
    grpo.main()
    written = json.loads((tmp_path / "rewards.json").read_text())
    assert len(written["rewards"]) == 2 and {*written["heldout"]} == {"before", "after"}
    assert (tmp_path / "rewards.png").stat().st_size > 1000
    assert "held-out reward" in capsys.readouterr().out
    base, _ = fastlora.load("demo", dtype="float32", device="cpu")
    fastlora.load_adapter(base, tmp_path)
