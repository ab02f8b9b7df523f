"""A hypernetwork writes an adapter from a number: replies of a requested length.

    python scripts/examples/hypernetwork.py [--quick] [--out FILE]      about 65 s on one core

A small nn.Module maps the requested number of words to all matrices of an adapter, through
`functional_call` (Ha et al. 2017, arXiv:1609.09106; for LoRA Charakorn et al. 2025, "Text-to-LoRA",
arXiv:2506.06105). It is trained on replies cut to 1, 3, 5, 7 and 9 words, whose adapters are one
stack. Adapters of other lengths were never trained: the network interpolates them.
"""

from pathlib import Path
from typing import Any

import figures as fig
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

import fastlora
from fastlora import functional as FL

SEEN, LENGTHS = (1, 3, 5, 7, 9), tuple(range(1, 10))
RATE, STEPS, SEED = 2e-4, 160, 0


class Writer(nn.Module):
    """Lengths [n] -> a stack of n adapters, each the first adapter and a change."""

    def __init__(self, first: Any) -> None:
        super().__init__()
        self.first, self.structure = tree_flatten(first)
        self.sizes = [x.numel() for x in self.first]
        self.body = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, sum(self.sizes)))
        generator = torch.Generator().manual_seed(SEED)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5 if p.shape[-1] == 4 else 0.002, generator=generator)

    def forward(self, lengths: Tensor) -> Any:
        x = lengths.float()[:, None] / 9
        features = torch.cat([x, x.square(), 1 / (9 * x), torch.ones_like(x)], 1)
        changes = self.body(features).split(self.sizes, 1)
        leaves = [x + c.view(-1, *x.shape) for x, c in zip(self.first, changes, strict=True)]
        return tree_unflatten(leaves, self.structure)


def cut(rows: list[tuple[str, str]], length: int, tokenizer: Any) -> list[Any]:
    """The rows with replies of at least nine words, cut to `length` words."""
    long = [(prompt, reply.split()) for prompt, reply in rows]
    return fig.encode([(p, " ".join(w[:length])) for p, w in long if len(w) >= 9], tokenizer, 64)


def train(writer: Writer, seen: tuple[int, ...], data: list[Any], model: Any, steps: int) -> Any:
    """The writer's parameters after AdamW on the rows of each length that is seen."""
    _, spec = FL.stack([model])
    parameters = {name: p.detach() for name, p in writer.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=0.0)
    streams = [fig.endless(examples, 4, SEED) for examples in data]

    def loss(parameters: dict[str, Tensor], batch: fig.Batch) -> Tensor:
        stack = functional_call(writer, parameters, torch.tensor(seen))
        return fig.loss_of_each(stack, model.base, spec, batch).mean()

    for _ in range(steps):
        batch = fig.as_batch([row for stream in streams for row in next(stream)])
        _, grads = fastlora.value_and_grad(loss)(parameters, batch)
        for name, p in parameters.items():
            p.grad = grads[name]
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
    return parameters


def words_written(stacked: Any, tokenizer: Any, prompts: list[str], n: int) -> Tensor:
    """The words [n, prompts] of the reply of each of n adapters to each prompt."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts] * n
    ids = [i for i in range(n) for _ in prompts]
    how: dict[str, Any] = dict(adapter_ids=ids, max_new_tokens=32, max_batch=64)
    words = torch.zeros(len(chats))
    for reply in fastlora.generate_many(stacked, chats, tokenizer=tokenizer, **how):
        words[reply.index] = len((reply.text or "").split())
    return words.view(n, -1)


def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the mean number of words written for each requested length."""
    seen, lengths, steps, count = ((1, 9), (1, 9), 25, 2) if quick else (SEEN, LENGTHS, STEPS, 24)
    model, tokenizer = fig.demo()
    model = fastlora.lora(model, r=4, random_state=SEED)
    writer = Writer(model.adapter)
    data = [cut(fig.pairs("train", quick), n, tokenizer) for n in seen]
    parameters = train(writer, seen, data, model, steps)
    with torch.no_grad():
        stack = functional_call(writer, parameters, torch.tensor(lengths))
    stacked = fastlora.Model(spec=model.spec, base=model.base, adapter=stack)
    prompts = [prompt for prompt, _ in fig.pairs("heldout", quick)[:count]]
    words = words_written(stacked, tokenizer, prompts, len(lengths))
    means, spread = words.mean(1), words.std(1)

    figure, (axis,) = fig.new_figure()
    axis.plot(lengths, lengths, ":", color=fig.GREY, label="as requested")
    labels = {True: "lengths in training", False: "new lengths"}
    for known, color in ((True, fig.BLUE), (False, fig.ORANGE)):
        at = [i for i, n in enumerate(lengths) if (n in seen) == known]
        x, label = [lengths[i] for i in at], labels[known]
        axis.errorbar(x, means[at], spread[at], fmt="o", capsize=3, color=color, label=label)
    axis.set(xlabel="words requested", ylabel="words of the reply (mean, deviation)")
    axis.legend(frameon=False)
    fig.save(figure, out)
    return {"lengths": list(lengths), "means": means.tolist()}


if __name__ == "__main__":
    fig.run(main)
