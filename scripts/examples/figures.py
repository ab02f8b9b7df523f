"""Code of the examples that end in a figure: demo model, rows, a training loop, the style.

Needs matplotlib: pip install -e '.[plots]'.
"""

import argparse
import io
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora.checkpoints.atomic import atomic_write
from fastlora.checkpoints.hub import DEMO
from fastlora.data.batches import batches
from fastlora.data.encoding import encode_rows
from fastlora.data.examples import Example
from fastlora.data.rows import read_rows

Batch = dict[str, Tensor]

# Colours of Okabe and Ito (2008), which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#888888"


# ── model and data ────────────────────────────────────────────────────────────────────────


def demo() -> tuple[fastlora.Model, fastlora.Tokenizer]:
    """The model in the package, in float32 on the CPU, and its tokenizer."""
    model, tokenizer = fastlora.load("demo", dtype="float32", device="cpu")
    assert tokenizer is not None
    return model, tokenizer


def pairs(name: str, quick: bool = False) -> list[tuple[str, str]]:
    """(signature of a function, first line of its docstring) of each of the demo's rows.

    The order is a random one that is always the same, so that the first rows are a sample.

    Args:
        name: "train" or "heldout", which come from different modules.
        quick: return 300 rows, which need less time to encode.
    """
    chosen = read_rows(DEMO / f"{name}.jsonl")
    chosen = random.Random(0).sample(chosen, 300 if quick else len(chosen))
    found = (row["messages"] for row in chosen)
    return [(user["content"], assistant["content"]) for user, assistant in found]


def tasks(name: str, quick: bool = False) -> dict[str, list[tuple[str, str]]]:
    """Three tasks made of the same rows, which one can tell apart by their prompts."""
    found: dict[str, list[tuple[str, str]]] = {"summary": [], "signature": [], "name": []}
    for prompt, summary in pairs(name, quick):
        code = prompt.split("\n")[-1].strip()
        found["summary"].append((prompt, summary))
        found["signature"].append((summary, code))
        found["name"].append((code, code.removeprefix("async ").removeprefix("def ").split("(")[0]))
    return found


def chat(prompt: str, reply: str) -> dict[str, Any]:
    """A row of `fastlora.train`."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return {"messages": messages}


def encode(
    rows: Iterable[tuple[str, str]], tokenizer: fastlora.Tokenizer, longest: int = 32
) -> list[Example]:
    """(prompt, reply) pairs as token ids and labels; those of more than `longest` are left out."""
    chats = [chat(prompt, reply) for prompt, reply in rows]
    encoded = encode_rows(chats, tokenizer, max_seq_length=512)
    return [example for example in encoded if len(example.input_ids) <= longest]


def as_batch(examples: Sequence[Example]) -> Batch:
    """All examples as one padded batch, in order."""
    return next(batches(examples, len(examples), seed=None))


def endless(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """`size` examples at a time, in a new order each epoch."""
    if len(examples) < size:
        raise ValueError(f"{len(examples)} examples; expected at least {size}")
    for epoch in count():
        order = np.random.default_rng([seed, epoch]).permutation(len(examples))
        for first in range(0, len(order) - size + 1, size):
            yield [examples[i] for i in order[first : first + size]]


# ── several adapters in one pass ──────────────────────────────────────────────────────────


def for_all(batch: Batch, n: int) -> Batch:
    """The batch n times: the same rows for each adapter of a stack."""
    return {name: x.repeat(n, 1) for name, x in batch.items()}


def loss_of_each(stack: Any, base: Any, spec: Any, batch: Batch) -> Tensor:
    """The mean loss [n] of each of the stack's adapters over its rows, in one pass."""
    sums, tokens = FL.row_losses(stack, base, spec, batch)
    n = len(tree_leaves(stack)[0])
    return sums.view(n, -1).sum(1) / tokens.view(n, -1).sum(1)


@torch.no_grad()
def evaluate(models: Sequence[fastlora.Model], examples: Sequence[Example]) -> Tensor:
    """The mean loss [n] of each model over the same examples."""
    stack, spec = FL.stack(models)
    return loss_of_each(stack, models[0].base, spec, for_all(as_batch(examples), len(models)))


class Run(NamedTuple):
    """One training run: a model, and the optimizer that writes to its adapter."""

    model: fastlora.Model
    optimizer: torch.optim.Optimizer


def begin(model: fastlora.Model, rate: float) -> Run:
    """A run with a copy of the model's adapter, and AdamW with a constant learning rate."""
    adapter = tree_map(torch.clone, model.adapter)
    optimizer = torch.optim.AdamW(tree_leaves(adapter), lr=rate, weight_decay=0.0)
    return Run(model.with_adapter(adapter), optimizer)


def step_together(runs: Sequence[Run], batch: Batch) -> Tensor:
    """One step of all runs in one pass over the base. Returns the loss [n] of each before it.

    Args:
        runs: n of them.
        batch: rows for the first run, as many for the second one, and so on.
    """
    models = [run.model for run in runs]
    stack, spec = FL.stack(models)
    losses = []

    def total(stack: Any) -> Tensor:
        losses.append(loss_of_each(stack, models[0].base, spec, batch))
        return losses[0].sum()  # loss i depends on adapter i alone

    _, grads = fastlora.value_and_grad(total)(stack)
    for run, gradient in zip(runs, FL.unstack(grads, models), strict=True):
        parameters = tree_leaves(run.model.adapter)
        for x, g in zip(parameters, tree_leaves(gradient), strict=True):
            x.grad = g
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        run.optimizer.step()
    return losses[0].detach()


def train_together(
    models: Sequence[fastlora.Model],
    data: Sequence[Sequence[Example]],
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    batch_size: int = 8,
) -> tuple[list[fastlora.Model], Tensor]:
    """(the trained models, their losses [steps, n]). Run i trains models[i] on data[i] at rates[i],
    in the order of seeds[i]."""
    runs = [begin(model, rate) for model, rate in zip(models, rates, strict=True)]
    streams = [endless(own, batch_size, seed) for own, seed in zip(data, seeds, strict=True)]
    losses = []
    for _ in range(steps):
        batch = as_batch([example for stream in streams for example in next(stream)])
        losses.append(step_together(runs, batch))
    return [run.model for run in runs], torch.stack(losses)


def merged(adapters: Sequence[Any], weights: Tensor) -> Any:
    """An adapter of n times the rank: layer i adds the sum over j of weights[i, j] s B_j A_j.

    Args:
        adapters: n of them, of equal rank r and scaling s. The result needs scaling s and rank n r.
        weights: [layers, n]; gradients flow to them.
    """
    layers = []
    for own, w in zip(zip(*(a["layers"] for a in adapters), strict=True), weights, strict=True):
        layers.append({})
        for name in own[0]:
            a = torch.cat([layer[name].a for layer in own])
            b = torch.cat([w[j] * layer[name].b for j, layer in enumerate(own)], 1)
            layers[-1][name] = own[0][name]._replace(a=a, b=b)
    return {"layers": tuple(layers)}


def added(tree: Any, direction: Any, scale: float | Tensor = 1.0) -> Any:
    """tree + scale * direction, leaf by leaf."""
    return tree_map(lambda x, d: x + scale * d, tree, direction)


def smooth(losses: Tensor, width: int) -> Tensor:
    """Means over the last `width` steps (fewer at the beginning) of losses [steps, ...]."""
    return torch.stack([losses[max(0, i - width + 1) : i + 1].mean(0) for i in range(len(losses))])


# ── figures ───────────────────────────────────────────────────────────────────────────────


def new_figure(
    panels: int = 1, width: float = 6.4, height: float = 4.0
) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side. pyplot's global state is not touched."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, out: Path) -> None:
    """Write the figure as PNG with a palette, which is a third as large as one without."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    picture = Image.open(drawn).convert("RGB").quantize(128)
    atomic_write(out, lambda file: picture.save(file, format="PNG", optimize=True))


def run(main: Callable[[bool, Path], dict[str, Any]]) -> None:
    """The command line of an example: `--quick` and `--out`; prints the results as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few steps, for CI")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"{Path(sys.argv[0]).stem}.png")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found = main(args.quick, args.out)
    print(json.dumps({**found, "seconds": round(time.perf_counter() - start)}))
