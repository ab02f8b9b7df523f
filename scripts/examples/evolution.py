"""Evolution strategies: the population is a stack of adapters, and one forward pass rewards all.

    python scripts/examples/evolution.py [--quick] [--out FILE]      about 35 s on one core

The reward is the share of the model's first guesses without the letter e, plus the share that is
right. These are counts, without a gradient. Salimans et al. 2017 (arXiv:1703.03864) estimate one
from antithetic perturbations; Qiu et al. 2025 (arXiv:2509.24372) fine-tune language models so. The
first adapter is fine-tuned on the demo's rows; its B in two layers, 768 numbers, is what evolves.
"""

from pathlib import Path
from typing import Any

import figures as fig
import torch
from torch import Tensor

import fastlora
from fastlora import functional as FL

PAIRS, SIGMA, RATE, MOMENTUM, STEPS, SEED = 32, 0.1, 0.05, 0.8, 50, 0


def population(adapter: Any, changes: Tensor) -> Any:
    """A stack of n adapters whose B differ from the given one by changes [n, numbers in all B]."""
    layers, first, n = [], 0, len(changes)
    for own in adapter["layers"]:
        layers.append({})
        for name, record in own.items():
            change = changes[:, first : first + record.b.numel()].view(n, *record.b.shape)
            layers[-1][name] = record._replace(a=torch.stack([record.a] * n), b=record.b + change)
            first += record.b.numel()
    return {"layers": tuple(layers)}


def shares(
    stack: Any, model: fastlora.Model, without_e: Tensor, batch: fig.Batch, n: int
) -> Tensor:
    """[2, n]: the share of each adapter's first guesses without an e, and that of right ones."""
    _, spec = FL.stack([model])
    batch = fig.for_all(batch, n)
    labels = batch["labels"][:, 1:]
    guesses = FL.forward(stack, model.base, spec, batch["input_ids"])[:, :-1].argmax(-1)
    replied = labels != -100
    found = torch.stack([without_e[guesses[replied]], (guesses == labels)[replied]])
    return found.view(2, n, -1).float().mean(-1)


def reply(model: fastlora.Model, tokenizer: fastlora.Tokenizer, prompt: str) -> str:
    chat = [{"role": "user", "content": prompt}]
    return model.generate_text(tokenizer, chat, max_new_tokens=12).strip()


def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the rewards of held-out rows by step, and replies."""
    pairs, steps, every, tuning = (16, 8, 8, 10) if quick else (PAIRS, STEPS, 5, 60)
    base, tokenizer = fig.demo()
    examples = fig.encode(fig.pairs("train", quick), tokenizer)
    held = fig.as_batch(fig.encode(fig.pairs("heldout", quick), tokenizer)[:64])
    where: dict[str, Any] = dict(target_modules=("o_proj", "down_proj"), layers_to_transform=[5, 6])
    start = fastlora.lora(base, r=1, lora_alpha=8, random_state=SEED, **where)
    (model,), _ = fig.train_together([start], [examples], rates=[1e-2], seeds=[SEED], steps=tuning)
    adapter: Any = model.adapter

    # Ids 0 to 3 are special tokens. The end of a reply has no e.
    letters = [
        i < 4 or "e" not in tokenizer.decode([i]).lower()
        for i in range(base.spec.config.vocab_size)
    ]
    without_e = torch.tensor(letters)
    numbers = sum(r.b.numel() for own in adapter["layers"] for r in own.values())
    generator = torch.Generator().manual_seed(SEED)
    stream = fig.endless(examples, 2, SEED)
    mean, velocity, curves = torch.zeros(numbers), torch.zeros(numbers), []
    with torch.no_grad():
        for step in range(steps + 1):
            if step % every == 0:
                alone = population(adapter, mean[None])
                curves.append(shares(alone, model, without_e, held, 1)[:, 0])
            noise = SIGMA * torch.randn(pairs, numbers, generator=generator)
            stack = population(adapter, torch.cat([mean + noise, mean - noise]))
            batch = fig.as_batch(next(stream))
            rewards = shares(stack, model, without_e, batch, 2 * pairs).sum(0)
            better = rewards[:pairs] - rewards[pairs:]
            estimate = better @ noise / (better.std() * pairs + 1e-8)
            velocity = MOMENTUM * velocity + (1 - MOMENTUM) * estimate
            mean = mean + RATE / SIGMA * velocity
        found = torch.stack(curves)
        evolved = model.with_adapter(FL.unstack(population(adapter, mean[None]), [model])[0])
    prompts = [prompt for prompt, _ in fig.pairs("heldout")[: 1 if quick else 6]]
    replies = [(reply(model, tokenizer, p), reply(evolved, tokenizer, p)) for p in prompts]

    figure, (axis,) = fig.new_figure()
    x = range(0, steps + 1, every)
    axis.plot(x, found[:, 0], "o-", color=fig.BLUE, label="guesses without the letter e")
    axis.plot(x, found[:, 1], "s--", color=fig.ORANGE, label="guesses that are right")
    axis.set(xlabel="step", ylabel="share of first guesses, held-out rows", ylim=(0, 1))
    axis.legend(frameon=False)
    fig.save(figure, out)
    return {"shares": found.tolist(), "rewards": found.sum(1).tolist(), "replies": replies}


if __name__ == "__main__":
    fig.run(main)
