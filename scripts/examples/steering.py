"""Activation steering: a vector in the residual stream makes replies begin with another word.

    python scripts/examples/steering.py [--quick] [--out FILE]      about 60 s on one core

A fifth of the demo's replies begin with "Return", and after a short fine-tuning those of the model
do too. The first vector is the difference between two means of the last prompt token's state: over
rows with this word and over rows without it (Turner et al. 2023, arXiv:2308.10248; Rimsky et al.
2023, arXiv:2312.06681). The second one has the same norm and is trained by its gradient.
Needs matplotlib: pip install "fastlora[plots]".
"""

import argparse
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import fastlora
from fastlora import functional as FL
from fastlora.checkpoints.hub import DEMO
from fastlora.data.rows import read_rows

WORD, LONGEST, RATE = "Return", 40, 0.05
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#888888"  # of Okabe and Ito (2008)
Inputs = dict[str, Any]


def prompts(chats: list[Any], n: int, tokenizer: fastlora.Tokenizer) -> tuple[Inputs, Tensor]:
    """(n of the prompts, padded on the left; whether the reply begins with WORD)."""
    ids = [tokenizer.apply_chat_template(x[:1], add_generation_prompt=True) for x in chats[: 2 * n]]
    kept = [i for i, x in enumerate(ids) if len(x) <= LONGEST][:n]
    pads = [LONGEST - len(ids[i]) for i in kept]
    tokens = [[0] * pad + ids[i] for i, pad in zip(kept, pads, strict=True)]
    mask = (torch.arange(LONGEST) >= torch.tensor(pads)[:, None]).long()
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": mask}
    return inputs, torch.tensor([chats[i][1]["content"].startswith(WORD) for i in kept])


def first_word(model: fastlora.Model, inputs: Inputs, token: int, add: Any) -> Tensor:
    """The log-probability of WORD as the first token of each reply."""
    logits = FL.forward(model.adapter, model.base, model.spec, **inputs, add=add)
    return logits[:, -1].log_softmax(-1)[:, token]


def train(
    model: fastlora.Model, inputs: Inputs, token: int, place: str, norm: Tensor, steps: int
) -> Tensor:
    """A vector of a given norm, trained to make WORD likely."""
    vector = torch.randn(model.spec.config.hidden_size, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([vector], lr=RATE)

    def loss(vector: Tensor) -> Tensor:
        add = {place: norm * vector / vector.norm()}
        return -first_word(model, inputs, token, add).mean()

    for _ in range(steps):
        _, vector.grad = fastlora.value_and_grad(loss)(vector)
        optimizer.step()
    return norm * vector / vector.norm()


def draw(strengths: list[float], shares: dict[str, list[float]], out: Path) -> None:
    """The share of WORD by strength, a line for each vector."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for (name, share), color in zip(shares.items(), (BLUE, ORANGE, GREY), strict=True):
        axis.plot(strengths, share, color=color, label=name)
    axis.set(xlabel="strength", ylabel=f'mean probability of "{WORD}"')
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=100)


@torch.no_grad()
def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns probabilities by strength, and replies with and without a vector."""
    model, tokenizer = fastlora.load("demo", dtype="float32", device="cpu")
    assert tokenizer is not None
    rows, held_rows = (read_rows(DEMO / f"{name}.jsonl") for name in ("train", "heldout"))
    random.Random(0).shuffle(rows)
    steps, learn = 8 if quick else 60, partial(fastlora.train, packing=False, progress=False)
    model, _ = learn(fastlora.lora(model, r=8), tokenizer, rows[: 8 * steps], learning_rate=3e-3)
    token, place = tokenizer.encode(WORD)[-1], "layers.3.out"
    chats, held_chats = ([row["messages"] for row in some] for some in (rows, held_rows))
    seen, begins = prompts(chats, 64 if quick else 768, tokenizer)
    held, _ = prompts(held_chats, 32 if quick else 192, tokenizer)
    last = model(**seen, capture=[place])[1][place][:, -1]
    difference = last[begins].mean(0) - last[~begins].mean(0)
    norm, generator = difference.norm(), torch.Generator().manual_seed(1)
    noise = torch.randn(difference.shape, generator=generator)
    some = {name: x[:16] for name, x in seen.items()}
    vectors = {
        "difference of means": difference,
        "trained, of the same norm": train(model, some, token, place, norm, steps),
        "random, of the same norm": norm * noise / noise.norm(),
    }
    strengths = [float(x) for x in torch.linspace(-6, 6, 5 if quick else 13)]
    share = lambda v, s: first_word(model, held, token, {place: s * v}).exp().mean().item()
    shares = {name: [share(v, s) for s in strengths] for name, v in vectors.items()}
    draw(strengths, shares, out)
    replies = {}
    for s in (-6.0, 0.0, 6.0):
        write = partial(model.generate_text, max_new_tokens=16, add={place: s * difference})
        replies[s] = [write(tokenizer, x[:1]) for x in held_chats[:3]]
    return {"strengths": strengths, "shares": shares, "replies": replies}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")  # a few steps, for CI
    parser.add_argument("--out", type=Path, default=Path("runs/steering.png"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(json.dumps(main(args.quick, args.out)))
