"""Activation steering: a vector in the residual stream makes replies begin with another word.

    python scripts/examples/steering.py [--quick] [--out FILE]      about 30 s on two cores

A fifth of the demo's rows have a reply that begins with "Return". The first vector is the
difference of two means: of the tensors at the last token of the prompt, over rows that do and rows
that do not (Turner et al. 2023, arXiv:2308.10248; Rimsky et al. 2023, arXiv:2312.06681). The second
one has the same norm and is trained by its gradient. Needs matplotlib: pip install
"fastlora[plots]".
"""

import argparse
import json
import random
import time
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


def prompts(name: str, n: int, tokenizer: fastlora.Tokenizer) -> tuple[Inputs, Tensor]:
    """(n prompts of a file of the demo, padded on the left; whether the reply begins with WORD)."""
    rows = random.Random(0).sample(read_rows(DEMO / f"{name}.jsonl"), 3 * n)
    chats = [row["messages"] for row in rows]
    ids = [tokenizer.apply_chat_template(x[:1], add_generation_prompt=True) for x in chats]
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
    """A vector of a given norm under which WORD is likely at half its strength."""
    vector = torch.randn(model.spec.config.hidden_size, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([vector], lr=RATE)

    def loss(vector: Tensor) -> Tensor:
        add = {place: 0.5 * norm * vector / vector.norm()}
        return -first_word(model, inputs, token, add).mean()

    for _ in range(steps):
        _, vector.grad = fastlora.value_and_grad(loss)(vector)
        optimizer.step()
    return norm * vector / vector.norm()


def draw(strengths: list[float], shares: dict[str, list[float]], out: Path) -> None:
    """The share of WORD by strength, a line for each vector."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    styles = [("-", BLUE), ("--", ORANGE), (":", GREY)]
    for (name, share), (style, color) in zip(shares.items(), styles, strict=True):
        axis.plot(strengths, share, style, color=color, label=name)
    axis.axvline(0, color="#dddddd", zorder=0)
    axis.set(xlabel="strength", ylabel=f'mean probability of "{WORD}" as the first word')
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=100)


@torch.no_grad()
def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns probabilities by strength, and replies with and without a vector."""
    model, tokenizer = fastlora.load("demo", dtype="float32", device="cpu")
    assert tokenizer is not None
    token, place = tokenizer.encode(WORD)[-1], "layers.3.out"
    seen, begins = prompts("train", 128 if quick else 768, tokenizer)
    held, _ = prompts("heldout", 32 if quick else 256, tokenizer)
    _, found = model(**seen, capture=[place])
    last = found[place][:, -1]
    difference = last[begins].mean(0) - last[~begins].mean(0)
    norm, noise = difference.norm(), torch.randn(last.shape[1], generator=torch.Generator())
    rows = {name: x[: 16 if quick else 64] for name, x in seen.items()}
    vectors = {
        "difference of means": difference,
        "trained, of the same norm": train(model, rows, token, place, norm, 8 if quick else 60),
        "random, of the same norm": norm * noise / noise.norm(),
    }
    strengths = [float(x) for x in torch.linspace(-4, 4, 5 if quick else 17)]
    share = lambda v, s: first_word(model, held, token, {place: s * v}).exp().mean().item()
    shares = {name: [share(v, s) for s in strengths] for name, v in vectors.items()}
    draw(strengths, shares, out)
    prompt = [{"role": "user", "content": "# shelf\nclass Shelf:\n    def find(self, book):"}]
    write = lambda s: model.generate_text(
        tokenizer, prompt, max_new_tokens=16, add={place: s * difference}
    )
    replies = {str(s): write(s) for s in (-3.0, 0.0, 3.0)}
    return {"strengths": strengths, "shares": shares, "replies": replies}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rows and steps, for CI")
    parser.add_argument("--out", type=Path, default=Path("runs/steering.png"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found = main(args.quick, args.out)
    print(json.dumps({**found, "seconds": round(time.perf_counter() - start)}))
