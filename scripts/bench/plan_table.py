"""Print the tables of fastlora/distributed/README.md: what plan() predicts for 1 to 512 GPUs.

python scripts/bench/plan_table.py

Nothing is measured or allocated: models are shapes on the device "meta".
"""

from typing import Any

import torch
from random_checkpoint import SHAPES as CHECKPOINTS
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.distributed.reading import described_nf4
from fastlora.models.config_json import config_from_json
from fastlora.models.names import base_from_tensors, base_tensors, projection_weights
from fastlora.models.spec import Spec

_LARGE = dict(head_dim=128, num_key_value_heads=8)
SHAPES: dict[str, dict[str, Any]] = {
    "8B": CHECKPOINTS["8b"],
    "70B": CHECKPOINTS["8b"]
    | _LARGE
    | dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64)
    | dict(num_hidden_layers=80),
    "405B": CHECKPOINTS["8b"]
    | _LARGE
    | dict(hidden_size=16384, intermediate_size=53248, num_attention_heads=128)
    | dict(num_hidden_layers=126),
}
GPUS = (1, 2, 4, 8, 16, 64, 512)
# Model, weights in 4 bits, memory of the card: with the base in host memory.
STREAMED = (
    ("8B", False, "16GB"),
    ("70B", True, "24GB"),
    ("70B", False, "24GB"),
    ("405B", True, "40GB"),
)


def model_of(name: str, *, in_4bit: bool) -> fastlora.Model:
    """A model of a real size with r = 16 on all projections; its tensors have no memory."""
    config = config_from_json(SHAPES[name])
    packed = {*projection_weights(config)} if in_4bit else set()
    tensors: dict[str, Any] = {
        key: described_nf4(shape, torch.bfloat16)
        if key in packed
        else torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for key, shape in base_tensors(config).items()
    }
    base = base_from_tensors(config, tensors)
    spec = Spec(config=config, name_or_path=name, max_seq_length=config.max_position_embeddings)
    return fastlora.lora(fastlora.Model(spec=spec, base=base), r=16)


def line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def sharded_table() -> list[str]:
    """80 GB cards with NVLink, 8 in a machine with 8 ports of 400G, 4 x 2048 tokens a GPU."""
    heads = ("model", "weights", "GPUs", "shard x replicate", "recompute", "GiB a GPU", "step, s")
    heads += ("gathered, GB", "longer by, ms", "efficiency")
    lines = [line(*heads), "|" + "---|" * len(heads)]
    for name in SHAPES:
        for in_4bit in (False, True):
            model = model_of(name, in_4bit=in_4bit)
            lines += [sharded_line(model, name, in_4bit, n) for n in GPUS]
    return lines


def sharded_line(model: fastlora.Model, name: str, in_4bit: bool, gpus: int) -> str:
    first = name, "NF4" if in_4bit else "bf16", gpus
    machines: dict[str, Any] = dict(devices=min(gpus, 8), nodes=max(1, gpus // 8))
    try:
        x = fastlora.plan(model, 4, 2048, "80GB", card="H100", **machines).chosen
    except ValueError:
        return line(*first, "does not fit", *[""] * 6)
    assert x.step_seconds is not None and x.exposed_seconds is not None and x.efficiency is not None
    figures = (
        f"{x.peak_bytes / 2**30:.1f}",
        f"{x.step_seconds:.2f}",
        f"{x.gathered_bytes / 1e9:.0f}",
    )
    share = f"{1e3 * x.exposed_seconds:.0f}", f"{x.efficiency:.1%}"
    return line(*first, f"{x.shard} x {x.replicate}", x.recompute, *figures, *share)


def streamed_table() -> list[str]:
    """One card, the base in host memory, 2 x 2048 tokens, 8-bit moments, the rates of an H100."""
    heads = ("model", "weights", "card", "recompute", "GiB on the card", "GB in host memory")
    heads += ("copied, GB", "step, s", "longer by, s")
    lines = [line(*heads), "|" + "---|" * len(heads)]
    for name, in_4bit, memory in STREAMED:
        lines.append(streamed_line(model_of(name, in_4bit=in_4bit), name, in_4bit, memory))
    return lines


def streamed_line(model: fastlora.Model, name: str, in_4bit: bool, memory: str) -> str:
    how: dict[str, Any] = dict(card="H100", shard="host", optimizer="adamw_8bit")
    x = fastlora.plan(model, 2, 2048, memory, **how).chosen
    assert x.step_seconds is not None and x.exposed_seconds is not None
    held = sum(leaf.nbytes for leaf in tree_leaves(model.base)) / 1e9
    cells = name, "NF4" if in_4bit else "bf16", memory, x.recompute
    figures = f"{x.peak_bytes / 2**30:.1f}", f"{held:.0f}", f"{x.copied_bytes / 1e9:.0f}"
    return line(*cells, *figures, f"{x.step_seconds:.2f}", f"{x.exposed_seconds:.2f}")


def tables() -> str:
    """Both tables, as the README has them."""
    return "\n".join([*sharded_table(), "", *streamed_table()])


if __name__ == "__main__":
    print(tables())
