"""MAML with the second-order gradient through an inner SGD step, beside the first-order one.

    python scripts/examples/maml.py [--quick] [--out FILE]      about 60 s on one core

Finn et al. 2017, "Model-Agnostic Meta-Learning" (arXiv:1703.03400). In a task, the reply to every
prompt is one word, which only the task's two support rows tell. The adapter is trained so that one
SGD step on these rows predicts the word for other prompts. The words of the tests are new ones.
The first-order gradient leaves out how the inner step depends on the adapter.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import figures as fig
import numpy as np
import torch
from torch.func import grad_and_value
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL

INNER, RATE, STEPS, EVERY, SEED = 0.1, 1e-3, 30, 3, 0
Task = tuple[fig.Batch, fig.Batch]  # support, query
Meta = Callable[[Any, list[Task]], torch.Tensor]


def tasks_of(words: list[str], prompts: list[str], tokenizer: Any, seed: int) -> Iterator[Task]:
    """Endless tasks: two support rows and four query rows, all with the same word as reply."""
    generator = np.random.default_rng(seed)
    while True:
        word, chosen = generator.choice(words), generator.choice(prompts, 6, replace=False)
        rows = fig.encode([(str(prompt), str(word)) for prompt in chosen], tokenizer, 512)
        yield fig.as_batch(rows[:2]), fig.as_batch(rows[2:])


def words_of(replies: list[str], n: int) -> list[str]:
    """The n most frequent words of six letters or more."""
    found = [w for reply in replies for w in reply.split() if w.isalpha() and len(w) > 5]
    names, counts = np.unique([w.lower() for w in found], return_counts=True)
    return names[np.argsort(-counts, kind="stable")][:n].tolist()


def train(meta: Meta, adapter: Any, tasks: Iterator[Task], steps: int, n: int) -> Iterator[Any]:
    """(step, adapter) before each step of Adam on the meta-loss of n tasks, and after the last."""
    adapter = tree_map(torch.clone, adapter)
    leaves = tree_leaves(adapter)
    optimizer = torch.optim.Adam(leaves, lr=RATE)
    for step in range(steps + 1):
        yield step, adapter
        if step == steps:
            return
        _, grads = fastlora.value_and_grad(meta)(adapter, [next(tasks) for _ in range(n)])
        for x, g in zip(leaves, tree_leaves(grads), strict=True):
            x.grad = g
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()


def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the query losses on new words of both ways to train."""
    steps, every, count, per_step = (6, 6, 4, 2) if quick else (STEPS, EVERY, 16, 4)
    model, tokenizer = fig.demo()
    model = fastlora.lora(model, r=4, random_state=SEED)
    base, spec = model.base, model.spec
    prompts, replies = zip(*fig.pairs("train"), strict=True)
    prompts = [prompt for prompt in prompts if len(prompt) < 60]
    words = words_of(list(replies), 96)
    test = tasks_of(words[::4], prompts, tokenizer, seed=1)
    unseen = [next(test) for _ in range(count)]

    def loss(adapter: Any, batch: fig.Batch) -> torch.Tensor:
        return FL.loss(adapter, base, spec, batch)

    def after_one_step(adapter: Any, task: Task, second_order: bool) -> torch.Tensor:
        support, query = task
        grads, _ = grad_and_value(loss)(adapter, support)
        if not second_order:
            grads = tree_map(torch.detach, grads)
        return loss(fig.added(adapter, grads, -INNER), query)

    def curve(second_order: bool) -> list[float]:
        meta = lambda adapter, tasks: torch.stack(
            [after_one_step(adapter, task, second_order) for task in tasks]
        ).mean()
        seen = [word for i, word in enumerate(words) if i % 4]
        stream = tasks_of(seen, prompts, tokenizer, seed=SEED)
        training = train(meta, model.adapter, stream, steps, per_step)
        with torch.no_grad():
            return [meta(a, unseen).item() for step, a in training if step % every == 0]

    curves = {second_order: curve(second_order) for second_order in (True, False)}
    figure, (axis,) = fig.new_figure()
    axis.plot(range(0, steps + 1, every), curves[True], "o-", color=fig.BLUE, label="second order")
    axis.plot(
        range(0, steps + 1, every), curves[False], "s--", color=fig.ORANGE, label="first order"
    )
    axis.set(xlabel="meta-training step", ylabel="loss of new words after one inner step")
    axis.legend(frameon=False)
    fig.save(figure, out)
    return {"second_order": curves[True], "first_order": curves[False]}


if __name__ == "__main__":
    fig.run(main)
