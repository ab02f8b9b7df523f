"""Activation steering: a vector in the residual stream makes replies begin with another word.

    python scripts/examples/steering.py [--quick] [--out FILE]      about 60 s on one core

A fifth of the demo's replies begin with "Return", and after a short fine-tuning those of the model
do too. The first vector is the difference between two means of the last prompt token's state: over
rows with this word and over rows without it (Turner et al. 2023, arXiv:2308.10248; Rimsky et al.
2023, arXiv:2312.06681). The second one has the same norm and is trained by its gradient.
"""

from functools import partial
from pathlib import Path
from typing import Any

import figures as fig
import torch
from torch import Tensor

import fastlora
from fastlora import functional as FL

WORD, PLACE, LONGEST, RATE = "Return", "layers.3.out", 40, 0.05


def prompts(rows: list[Any], n: int, tokenizer: Any) -> tuple[dict[str, Any], Tensor]:
    """(n of the prompts, padded on the left; whether the reply begins with WORD)."""
    chats = [[{"role": "user", "content": prompt}] for prompt, _ in rows[: 2 * n]]
    ids = [tokenizer.apply_chat_template(x, add_generation_prompt=True) for x in chats]
    kept = [i for i, x in enumerate(ids) if len(x) <= LONGEST][:n]
    pads = [LONGEST - len(ids[i]) for i in kept]
    tokens = [[0] * pad + ids[i] for i, pad in zip(kept, pads, strict=True)]
    mask = (torch.arange(LONGEST) >= torch.tensor(pads)[:, None]).long()
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": mask}
    return inputs, torch.tensor([rows[i][1].startswith(WORD) for i in kept])


def first_word(model: fastlora.Model, inputs: Any, token: int, vector: Tensor) -> Tensor:
    """The log-probability of WORD as the first token of each reply."""
    args = model.adapter, model.base, model.spec
    logits = FL.forward(*args, **inputs, add={PLACE: vector})
    return logits[:, -1].log_softmax(-1)[:, token]


def train(model: fastlora.Model, inputs: Any, token: int, norm: Tensor, steps: int) -> Tensor:
    """A vector of a given norm, trained to make WORD likely."""
    vector = torch.randn(model.spec.config.hidden_size, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([vector], lr=RATE)

    def loss(vector: Tensor) -> Tensor:
        return -first_word(model, inputs, token, norm * vector / vector.norm()).mean()

    for _ in range(steps):
        _, vector.grad = fastlora.value_and_grad(loss)(vector)
        optimizer.step()
    return norm * vector / vector.norm()


def draw(strengths: list[float], shares: dict[str, list[float]], out: Path) -> None:
    """The probability of WORD by strength, a line for each vector."""
    figure, (axis,) = fig.new_figure()
    colors = fig.BLUE, fig.ORANGE, fig.GREY
    for (name, share), color in zip(shares.items(), colors, strict=True):
        axis.plot(strengths, share, color=color, label=name)
    axis.set(xlabel="strength", ylabel=f'mean probability of "{WORD}" as the first word')
    axis.legend(frameon=False)
    fig.save(figure, out)


@torch.no_grad()
def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns probabilities by strength, and replies with and without a vector."""
    (model, tokenizer), steps = fig.demo(), 8 if quick else 60
    rows, held_rows = fig.pairs("train", quick), fig.pairs("heldout", quick)
    data = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]}
        for p, r in rows[: 8 * steps]
    ]
    learn = partial(fastlora.train, packing=False, progress=False, learning_rate=3e-3)
    model, _ = learn(fastlora.lora(model, r=8), tokenizer, data)
    token = tokenizer.encode(WORD)[-1]
    seen, begins = prompts(rows, 64 if quick else 768, tokenizer)
    held, _ = prompts(held_rows, 32 if quick else 192, tokenizer)
    last = model(**seen, capture=[PLACE])[1][PLACE][:, -1]
    difference = last[begins].mean(0) - last[~begins].mean(0)
    norm, generator = difference.norm(), torch.Generator().manual_seed(1)
    noise = torch.randn(difference.shape, generator=generator)
    some = {name: x[:16] for name, x in seen.items()}
    vectors = {
        "difference of means": difference,
        "trained, of the same norm": train(model, some, token, norm, steps),
        "random, of the same norm": norm * noise / noise.norm(),
    }
    strengths = [float(x) for x in torch.linspace(-6, 6, 5 if quick else 13)]
    share = lambda v, s: first_word(model, held, token, s * v).exp().mean().item()
    shares = {name: [share(v, s) for s in strengths] for name, v in vectors.items()}
    draw(strengths, shares, out)
    replies = {}
    for s in (-6.0, 0.0, 6.0):
        write = partial(model.generate_text, max_new_tokens=16, add={PLACE: s * difference})
        chats = [[{"role": "user", "content": prompt}] for prompt, _ in held_rows[:3]]
        replies[s] = [write(tokenizer, chat) for chat in chats]
    return {"strengths": strengths, "shares": shares, "replies": replies}


if __name__ == "__main__":
    fig.run(main)
