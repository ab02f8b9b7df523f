"""What each rank checks of context parallel. See server.py. Laws return figures, not verdicts."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves

import fastlora
from distributed.laws import RANK, adapted
from distributed.laws import ROWS as TEXTS
from fastlora import functional as FL
from fastlora.distributed.mesh import world_size
from fastlora.models import context_part
from fastlora.ops.attention.context_group import ContextGroup
from fastlora.runtime import compiled
from oracles.trees import randomised, token_ids

# Rows of 42 tokens: no multiple of 4 or 8, so they are padded.
B, T = 2, 42
IDS = token_ids(B, T, vocab_size=90)


def documents(*lengths: int) -> Tensor:
    lengths = (*lengths, T - sum(lengths))
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def padded(left: bool) -> dict[str, Tensor]:
    mask = torch.ones_like(IDS)
    mask[0, slice(0, 9) if left else slice(31, T)] = 0
    return {"attention_mask": mask, "labels": torch.where(mask == 0, -100, IDS)}


ROWS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "packed": {"segment_ids": torch.stack([documents(11, 20), documents(30)])},
    "right": padded(left=False),
    "left": padded(left=True),
}


def model_of(folder: str, kind: str = "", shard: int | None = None, **how: Any) -> fastlora.Model:
    """A model of a folder in float64 unless `how` says another type, with a random adapter."""
    spec = {name: how.pop(name) for name in ("recompute", "kernels", "compile") if name in how}
    given: dict[str, Any] = dict(device="cpu", dtype="float64") | how
    base, _ = fastlora.load(Path(folder), shard=shard, **given)
    lora: dict[str, Any] = {
        "": dict(target_modules=["q_proj", "k_proj", "o_proj"]),
        "dropout": dict(lora_dropout=0.2, target_modules=["q_proj", "up_proj", "lm_head"]),
        "dora": dict(lora_dropout=0.2, use_dora=True, target_modules=["v_proj", "down_proj"]),
        "fused": dict(lora_dropout=0.2, target_modules=["qkv_proj", "o_proj", "gate_up_proj"]),
        "rows": dict(trainable_token_indices=[3, 7, 50]),
    }[kind]
    model = fastlora.lora(base, r=2, adapter_dtype=given["dtype"], **lora)
    return model.with_adapter(randomised(model.adapter, 0)).with_spec(**spec)


def flat(grads: Any, *more: Tensor) -> Tensor:
    return torch.cat([x.detach().double().reshape(-1) for x in (*tree_leaves(grads), *more)])


def share(model: fastlora.Model, batch: dict[str, Tensor], context: Any, noise: Any) -> Tensor:
    """Gradients, loss and trained tokens of this process, side by side."""
    spec = dataclasses.replace(model.spec, neftune_alpha=noise)
    how: dict[str, Any] = dict(seed=5, first_row=torch.tensor(2 * B * T), context=context)
    counts = []

    def loss(adapter: Any) -> Tensor:
        total, count = FL.loss_sum(adapter, model.base, spec, batch, **how)
        counts.append(count)
        return total / 50

    value, grads = fastlora.value_and_grad(loss)(model.adapter)
    return flat(grads, value, counts[0])


def gradients(scratch: Path, cases: dict[str, dict[str, Any]]) -> dict[str, float]:
    """By case, the largest difference between one rank and the sum of all ranks, relative to the
    largest number."""
    found = {}
    for name, case in cases.items():
        case = dict(case)
        noise, rows = case.pop("noise", None), case.pop("rows", "plain")
        kernels, shard = case.get("kernels") == "triton", case.pop("shard", None)
        batch = {"input_ids": IDS, "labels": IDS} | ROWS[rows]
        with kernels_take_everything() if kernels else contextlib.nullcontext():
            context = fastlora.context_group(case.pop("ranks", world_size()), "cpu")
            own = share(model_of(**case, shard=shard), batch, context, noise)
        dist.all_reduce(own)
        own /= dist.get_world_size() / context.ranks  # groups have the same batch
        whole = {k: x for k, x in case.items() if k not in ("kernels", "compile")}
        want = share(model_of(**whole), batch, None, noise)
        found[name] = ((own - want).abs().max() / want.abs().max().clamp(min=1)).item()
    return found


@contextlib.contextmanager
def kernels_take_everything() -> Iterator[None]:
    """The kernels run in float32 and for heads of any size."""
    original, context_part.kernel_supports = context_part.kernel_supports, lambda *_: True
    yield
    context_part.kernel_supports = original


def transfers(scratch: Path, folder: str) -> dict[str, list[int]]:
    """By recompute level, the gathers and the sums of a forward and a backward pass."""
    counts: Counter[str] = Counter()
    for name in ("all_gather_single", "all_to_all_single"):
        original = getattr(dist, name)

        def counting(*args: Any, name: str = name, original: Any = original, **given: Any) -> Any:
            counts[name] += 1
            return original(*args, **given)

        setattr(dist, name, counting)
    context, found = fastlora.context_group(2, "cpu"), {}
    for level in ("none", "selective", "full", 0.5):
        counts.clear()
        batch = {"input_ids": IDS, "labels": IDS}
        share(model_of(folder, recompute=level), batch, context, None)
        found[str(level)] = [counts["all_gather_single"], counts["all_to_all_single"]]
    return found


def compiled_layers(scratch: Path, folder: str) -> dict[str, float]:
    """As `gradients`, of compiled layers; "gathers" is how many graphs have an op that gathers.

    AOT autograd without Inductor, whose C++ takes each rank 20 seconds.
    """
    made: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        made.append(graph)
        return graph.forward

    compiled.backend = aot_autograd(fw_compiler=keep)
    cases = {
        level: dict(folder=folder, rows="packed", compile=True, recompute=level, kind="dropout")
        for level in ("none", "selective")
    }
    found = gradients(scratch, cases)
    ops = [{str(node.target) for node in graph.graph.nodes} for graph in made]
    return found | {"gathers": sum("fastlora.gather_tokens.default" in of for of in ops)}


def refused(scratch: Path) -> list[str]:
    """Errors of ranks that cannot have rows together."""
    found = []
    given: dict[str, Any] = dict(progress=False, max_steps=1)
    for call in (
        lambda: fastlora.context_group(3, "cpu"),
        lambda: fastlora.train(*adapted(), ["a"], context_parallel=3, **given),
        lambda: fastlora.train(*adapted(), TEXTS, context_parallel=1 + RANK(), **given),
    ):
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


def groups(scratch: Path) -> list[Any]:
    """[rank in the group, ranks, whether a second call gives the same group, sum of the ranks]."""
    group = fastlora.context_group(2, "cpu")
    assert isinstance(group, ContextGroup)
    number = torch.full((1, 1, 2, 1), float(RANK()))
    whole = torch.ops.fastlora.gather_tokens(number, 2, group.name)
    same = group == fastlora.context_group(2, torch.device("cpu"))
    # Rank 0 has the store by which the others connect, so it must not end before them.
    torch.distributed.barrier()
    return [group.rank, group.ranks, same, whole.flatten().tolist()]
