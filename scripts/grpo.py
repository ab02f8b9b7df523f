"""Reinforcement learning (GRPO) with a reward that a program checks.

    python scripts/grpo.py                          # the demo: 8 minutes on two cores
    python scripts/grpo.py --loss-type dr_grpo --steps 50

The demo's task is to describe a function in one line. Half of the reward is for its form: a capital
letter first, a full stop last. The other half is the share of the words in the function's name that
the line contains, times the share of the line's words that are not repetitions. A reply that does
not end in time gets none. A short supervised run teaches the task, then GRPO raises the reward.
Sampling and training use the same base tensors: there is one copy of the model.

Writes the adapter, rewards.json and rewards.png (with matplotlib: pip install -e '.[plots]')
to --output. Copy this file and change `reward`. `improve` is the whole algorithm.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finetuning.ending import user_errors
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora import losses
from fastlora.arguments import number, option, whole_number
from fastlora.checkpoints.hub import DEMO
from fastlora.data.batches import batches
from fastlora.data.examples import make_example
from fastlora.data.rows import read_rows
from fastlora.generation.many import Completion
from fastlora.text.tokenizer import Tokenizer

Chat = list[dict[str, str]]
Reward = Callable[[Chat, Completion], float]

HELDOUT = 64  # rows of the demo that the policy is measured on

# How the three papers scale rewards, and where they clip. Two parts of DAPO are left out: dynamic
# sampling, which replaces prompts whose samples all have the same reward, and the penalty for long
# replies.
KINDS: dict[str, dict[str, Any]] = {
    "grpo": dict(scale_rewards="group", epsilon_high=0.2),
    "dr_grpo": dict(scale_rewards="none", epsilon_high=0.2),
    "dapo": dict(scale_rewards="group", epsilon_high=0.28),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run, under the names of TRL's GRPOConfig."""

    loss_type: str = "dapo"
    steps: int = 120
    prompts_per_step: int = 8
    num_generations: int = 8  # samples of each prompt
    num_iterations: int = 2  # updates with the same samples; from the second on, ratios are clipped
    max_completion_length: int = 24
    learning_rate: float = 1e-3
    beta: float = 0.0  # weight of the divergence from the model before the run
    seed: int = 3407


def reward(prompt: Chat, reply: Completion) -> float:
    """In [0, 1]: form, and words of the function's name without repetitions; see above."""
    text = (reply.text or "").strip()
    said = re.findall(r"[a-z]+", text.lower())
    name = re.findall(r"(?:def|class) (\w+)", prompt[-1]["content"])[-1]
    wanted = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
    if reply.finish_reason != "stop" or not said or not wanted:
        return 0.0
    form = re.fullmatch(r"[A-Z][^.\n]*\.", text) is not None
    words = len(wanted & {*said}) / len(wanted) * len({*said}) / len(said)
    return (form + words) / 2


# ── the algorithm ─────────────────────────────────────────────────────────────────────────


def improve(
    model: fastlora.Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Chat],
    reward: Reward,
    settings: Settings,
) -> Iterator[tuple[fastlora.Model, float]]:
    """After each step, the model and the mean reward of the step's samples."""
    start = model.adapter
    adapter = tree_map(lambda x: x.detach().clone(), start)  # the optimizer writes to it
    leaves = tree_leaves(adapter)
    optimizer = torch.optim.AdamW(leaves, lr=settings.learning_rate, weight_decay=0.0)
    loss_and_grad = fastlora.value_and_grad(policy_loss)
    generator = np.random.default_rng(settings.seed)
    for step in range(settings.steps):
        model = model.with_adapter(adapter)
        chosen = generator.choice(len(prompts), settings.prompts_per_step, replace=False)
        chats = [prompts[i] for i in chosen]
        replies = sample(model, tokenizer, chats, settings, seed=settings.seed + step)
        rewards = [reward(chats[r.index], r) for r in replies]
        batch = policy_batch(tokenizer, chats, replies, rewards, settings)
        batch = {name: x.to(model.base["norm"].device) for name, x in batch.items()}
        for _ in range(settings.num_iterations):
            _, grads = loss_and_grad(adapter, model, batch, settings, start)
            for leaf, grad in zip(leaves, tree_leaves(grads), strict=True):
                leaf.grad = grad
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            optimizer.step()
        yield model.with_adapter(tree_map(torch.clone, adapter)), sum(rewards) / len(rewards)


def sample(
    model: fastlora.Model, tokenizer: Tokenizer, chats: list[Chat], settings: Settings, seed: int
) -> list[Completion]:
    """All samples of all prompts, sorted by prompt."""
    replies = fastlora.generate_many(
        model,
        chats,
        tokenizer=tokenizer,
        n=settings.num_generations,
        max_batch=settings.num_generations * len(chats),
        max_new_tokens=settings.max_completion_length,
        temperature=1.0,  # so that samples are drawn from the policy that the loss improves
        seed=seed,
        return_logprobs=True,
    )
    return sorted(replies, key=lambda reply: (reply.index, reply.sample))


def policy_batch(
    tokenizer: Tokenizer,
    chats: list[Chat],
    replies: list[Completion],
    rewards: list[float],
    settings: Settings,
) -> dict[str, Tensor]:
    """Prompts with their samples [b, t], the samples' log-probabilities, and the advantages [b]."""
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    rows = [(list(prompts[r.index]), r.ids) for r in replies]
    trained = [[False] * len(prompt) + [True] * len(ids) for prompt, ids in rows]
    examples = [
        make_example(prompt + ids, flags)
        for (prompt, ids), flags in zip(rows, trained, strict=True)
    ]
    batch = next(batches(examples, len(examples), seed=None))
    batch["old_logps"] = torch.zeros(batch["labels"].shape)
    for row, reply in enumerate(replies):
        assert reply.logprobs is not None
        batch["old_logps"][row, batch["labels"][row] != -100] = torch.tensor(reply.logprobs)
    groups = torch.tensor(rewards).view(len(chats), settings.num_generations)
    scale_rewards = KINDS[settings.loss_type]["scale_rewards"]
    advantages = losses.group_advantages(groups, scale_rewards=scale_rewards)
    return batch | {"advantages": advantages.flatten()}


def policy_loss(
    adapter: Any, model: fastlora.Model, batch: dict[str, Tensor], settings: Settings, start: Any
) -> Tensor:
    """`losses.grpo` of a batch of samples."""
    inputs: dict[str, Any] = dict(labels=batch["labels"], attention_mask=batch["attention_mask"])
    args = (model.base, model.spec, batch["input_ids"])
    logps = FL.token_logprobs(adapter, *args, **inputs)
    ref_logps = None
    if settings.beta:
        with torch.no_grad():
            ref_logps = FL.token_logprobs(start, *args, **inputs)
    return losses.grpo(
        logps,
        batch["old_logps"].to(logps),
        batch["advantages"].to(logps),
        batch["labels"] != -100,
        loss_type=settings.loss_type,
        epsilon_high=KINDS[settings.loss_type]["epsilon_high"],
        beta=settings.beta,
        ref_logps=ref_logps,
        max_completion_length=settings.max_completion_length,
    )


# ── the run ───────────────────────────────────────────────────────────────────────────────


@user_errors()
def main() -> None:
    run(parse_arguments())


def run(args: argparse.Namespace) -> None:
    """The supervised steps, GRPO, and what changed."""
    names = ("loss_type", "steps", "learning_rate", "beta", "seed")
    settings = Settings(**{name: getattr(args, name) for name in names})
    dtype = "auto" if torch.cuda.is_available() else "float32"
    base, tokenizer = fastlora.load(args.model, dtype=dtype, max_seq_length=128)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer.json; generating text needs one.")
    rows, heldout = read_rows(DEMO / "train.jsonl"), read_rows(DEMO / "heldout.jsonl")[:HELDOUT]
    prompts, held = ([row["messages"][:-1] for row in part] for part in (rows, heldout))
    model = fastlora.lora(base, r=16, random_state=args.seed)
    if args.warmup_steps:
        warmup = dict(max_steps=args.warmup_steps, batch_size=16, learning_rate=2e-3)
        model, _ = fastlora.train(model, tokenizer, rows, **warmup)
    before = heldout_reward(model, tokenizer, held, settings)
    print(f"after {args.warmup_steps} supervised steps: held-out reward {before:.3f}")
    started, rewards = time.perf_counter(), []
    steps = improve(model, tokenizer, prompts, reward, settings)
    for step, (newest, mean) in enumerate(steps, 1):
        model = newest
        rewards.append(mean)
        if step % 10 == 0 or step == settings.steps:
            passed = time.perf_counter() - started
            print(f"step {step:4d}  mean reward {np.mean(rewards[-10:]):.3f}  {passed:4.0f} s")
    after = heldout_reward(model, tokenizer, held, settings)
    print(f"held-out reward {after:.3f}, it was {before:.3f}")
    for chat in held[:5]:
        reply = model.generate_text(tokenizer, chat, max_new_tokens=settings.max_completion_length)
        print(f"  {chat[-1]['content'].splitlines()[-1].strip()}\n    {reply!r}")
    model.save_pretrained(args.output)
    write_rewards(args.output, rewards, {"before": before, "after": after})


def write_rewards(output: Path, rewards: list[float], heldout: dict[str, float]) -> None:
    """rewards.json, and rewards.png if matplotlib is installed."""
    (output / "rewards.json").write_text(json.dumps({"rewards": rewards, "heldout": heldout}))
    if find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure  # noqa: PLC0415  optional

    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    steps = range(1, len(rewards) + 1)
    axes.plot(steps, rewards, alpha=0.3, label="mean of a step's samples")
    recent = [np.mean(rewards[max(0, step - 10) : step]) for step in steps]
    axes.plot(steps, recent, color="C0", label="mean of the last 10 steps")
    ends = (0, len(rewards))
    axes.plot(
        ends, [heldout["before"], heldout["after"]], "o", color="C1", label="held-out, greedy"
    )
    axes.set(xlabel="step", ylabel="reward", ylim=(0, None))
    axes.legend()
    axes.figure.savefig(output / "rewards.png", dpi=120)  # pyright: ignore


def heldout_reward(
    model: fastlora.Model, tokenizer: Tokenizer, chats: list[Chat], settings: Settings
) -> float:
    """Mean reward of greedy replies."""
    length = settings.max_completion_length
    replies = fastlora.generate_many(model, chats, tokenizer=tokenizer, max_new_tokens=length)
    return float(np.mean([reward(chats[reply.index], reply) for reply in replies]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, defaults = parser.add_argument, Settings()
    add("--model", default="demo", help='"demo", a folder, or a Hub id')
    add("--loss-type", choices=KINDS, default=defaults.loss_type)
    count, rate = option(int, whole_number(0)), option(float, number(low=0))
    add("--steps", type=count, default=defaults.steps)
    add("--warmup-steps", type=count, default=60, help="supervised steps before GRPO; 0: none")
    add("--learning-rate", type=rate, default=defaults.learning_rate)
    add("--beta", type=rate, default=defaults.beta, help="divergence from the start, 0: none")
    add("--output", type=Path, default=Path("runs/grpo"), help="PEFT folder to write")
    add("--seed", type=option(int, whole_number(0, 2**63)), default=defaults.seed)
    return parser.parse_args()


if __name__ == "__main__":
    main()
