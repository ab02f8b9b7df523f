"""A hypernetwork writes an adapter from a number: replies of a requested length.

    python scripts/examples/hypernetwork.py [--quick] [--out FILE]      about 100 s on two cores

A small nn.Module maps the requested number of words to all matrices of an adapter, through
`functional_call` (Ha et al. 2017, arXiv:1609.09106; for LoRA: Charakorn et al. 2025, "Text-to-LoRA",
arXiv:2506.06105). It is trained on replies cut to 1, 3, 5, 7 and 9 words, all adapters in one stack.
The adapters of other lengths were never trained: the network interpolates them.
"""

from pathlib import Path
from typing import Any

import figures as fig
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

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
        x = lengths[:, None] / 9
        features = torch.cat([x, x.square(), 1 / lengths[:, None], torch.ones_like(x)], 1)
        changes = self.body(features).split(self.sizes, 1)
        leaves = [x + c.view(-1, *x.shape) for x, c in zip(self.first, changes, strict=True)]
        return tree_unflatten(leaves, self.structure)


def cut(rows: list[tuple[str, str]], length: int, tokenizer: Any) -> list[Any]:
    """The rows with replies of at least nine words, cut to `length` words."""
    long = [(prompt, reply.split()) for prompt, reply in rows]
    return fig.encode([(p, " ".join(w[:length])) for p, w in long if len(w) >= 9], tokenizer, 64)


def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the mean number of words written for each requested length."""
    steps, count, lengths = (6, 2, (1, 4, 9)) if quick else (STEPS, 24, LENGTHS)
    model, tokenizer = fig.demo()
    model = fastlora.lora(model, r=4, random_state=SEED)
    base = model.base
    writer = Writer(model.adapter)
    parameters = {name: p.detach() for name, p in writer.named_parameters()}
    _, spec = FL.stack([model])
    data = {n: cut(fig.pairs("train"), n, tokenizer) for n in SEEN}
    streams = [fig.endless(examples, 4, SEED) for examples in data.values()]

    def loss(parameters: dict[str, Tensor], batch: fig.Batch) -> Tensor:
        stack = functional_call(writer, parameters, torch.tensor(SEEN, dtype=torch.float32))
        return fig.loss_of_each(stack, base, spec, batch).mean()

    optimizer = torch.optim.Adam(tree_leaves(parameters), lr=RATE)
    for step in range(steps):
        batch = fig.as_batch([row for stream in streams for row in next(stream)])
        value, grads = fastlora.value_and_grad(loss)(parameters, batch)
        for name, p in parameters.items():
            p.grad = grads[name]
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            print(step, value.item())
    with torch.no_grad():
        stack = functional_call(writer, parameters, torch.tensor(lengths, dtype=torch.float32))
    stacked = fastlora.Model(spec=spec, base=base, adapter=tree_map(torch.clone, stack))
    prompts = [prompt for prompt, _ in fig.pairs("heldout")[: 10 * count : 10]]
    ids = [i for i in range(len(lengths)) for _ in prompts]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts] * len(lengths)
    done = fastlora.generate_many(
        stacked, chats, tokenizer=tokenizer, adapter_ids=ids, max_new_tokens=32, max_batch=64
    )
    written = [0] * len(ids)
    for reply in done:
        written[reply.index] = len((reply.text or "").split())
    words = torch.tensor(written, dtype=torch.float32).view(len(lengths), -1)
    print(words)
    means, spread = words.mean(1).tolist(), words.std(1).tolist()
    figure, (axis,) = fig.new_figure()
    axis.plot(lengths, lengths, ":", color=fig.GREY, label="as requested")
    for seen, color, label in ((True, fig.BLUE, "lengths in training"), (False, fig.ORANGE, "new lengths")):
        at = [i for i, n in enumerate(lengths) if (n in SEEN) == seen]
        axis.errorbar([lengths[i] for i in at], [means[i] for i in at], [spread[i] for i in at], fmt="o", color=color, label=label, capsize=3)
    axis.set(xlabel="requested words", ylabel="words of the reply")
    axis.legend(frameon=False)
    fig.save(figure, out)
    return {"lengths": list(lengths), "means": means}


if __name__ == "__main__":
    fig.run(main)
