"""Steps replayed from a CUDA graph, and steps in which the host never waits for the GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora import functional as FL
from fastlora.runtime import host_offload
from oracles.gpu_models import Row, adapted, together, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.part("llama3.2")]
POLICIES: list[Any] = ["none", "selective", 0.4, "full", "offload"]


def waits(folder: Path) -> Iterator[Row]:
    """Whether the host waits for the GPU in a step: CUDA's debug mode raises an error then."""
    for policy, documents in (*((p, 1) for p in POLICIES), ("selective", 3)):
        model = adapted(folder, "bfloat16", {"lora_dropout": 0.1}, recompute=policy)
        ids = tokens(model, 2, 128)
        batch = {"input_ids": ids, "labels": ids}
        if documents > 1:
            batch["segment_ids"] = (torch.arange(128, device="cuda") * documents // 128).repeat(
                2, 1
            )
        step = lambda model=model, batch=batch: fastlora.value_and_grad(FL.loss)(
            model.adapter, model.base, model.spec, batch, seed=7
        )
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            waited = 0.0
        except RuntimeError as error:
            print(str(error).splitlines()[0])
            waited = 1.0
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield f"a step waits for the GPU: {policy}, documents {documents}", waited, 0


def replayed(folder: Path) -> Iterator[Row]:
    """Steps replayed from a CUDA graph against the same steps launched one by one.

    Each step has a changed adapter, and all but the first two have other tokens and masks. The
    recording of the first batch in its place is dropped when the batch moves; the next one serves
    all batches. With "offload" a recording must not write to what the program pins later.
    """
    for policy in (*POLICIES, "packed"):
        how: dict[str, Any] = {} if policy == "packed" else {"recompute": policy}
        model = adapted(folder, "bfloat16", {"lora_dropout": 0.1}, **how)
        graphed = fastlora.value_and_grad(FL.loss, cuda_graph=True)
        worst, batches, pinned = 0.0, [], []
        for i in range(4):
            ids = (tokens(model, 2, 256) + i) % model.spec.config.vocab_size
            batches.append({"input_ids": ids, "labels": ids})
            if policy == "packed":
                documents = torch.arange(256, device="cuda") // (70 + i)
                batches[-1]["segment_ids"] = documents.expand_as(ids)
        for i in (0, 0, 1, 2, 3):
            batch = batches[i]
            args, seed = (model.adapter, model.base, model.spec, batch), torch.tensor(i).cuda()
            plain = fastlora.value_and_grad(FL.loss)(*args, seed=seed)
            worst = max(worst, together(graphed(*args, seed=seed), plain))
            for leaf in tree_leaves(model.adapter):
                leaf.mul_(0.9)
            pinned += [torch.zeros(2**n, pin_memory=True) for n in range(8, 20)]
        torch.cuda.synchronize()
        yield f"cuda_graph: {policy}, against the same steps launched", worst, 1e-2
        written = float(sum(x.count_nonzero() for x in pinned))
        yield f"cuda_graph: {policy}, pinned values that replays wrote to", written, 0


def dropped(folder: Path) -> Iterator[Row]:
    """A recording with "offload" is dropped while it is replayed; then memory is pinned."""
    model = adapted(folder, "bfloat16", recompute="offload")
    ids = tokens(model, 2, 256)
    args = model.adapter, model.base, model.spec, {"input_ids": ids, "labels": ids}
    graphed = fastlora.value_and_grad(FL.loss, cuda_graph=True)
    for _ in range(3):
        graphed(*args)
    sizes = {buffer.nbytes for buffer in graphed.buffers}
    assert sizes
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # half a second
    graphed(*args)
    del graphed
    later = [torch.zeros(n, dtype=torch.uint8, pin_memory=True) for n in sizes for _ in range(8)]
    torch.cuda.synchronize()
    written = float(sum(x.count_nonzero() for x in later))
    yield "cuda_graph: pinned values that a dropped recording wrote to", written, 0


def test_a_step_never_waits_for_the_gpu(checkpoint, check):
    folder, _ = checkpoint("llama3.2")
    check(waits(folder))


def test_a_dropped_recording_keeps_its_pinned_memory(checkpoint, check, monkeypatch):
    folder, _ = checkpoint("llama3.2")
    monkeypatch.setattr(host_offload, "_MIN_BYTES", 1)
    check(dropped(folder))


def test_replayed_steps_equal_launched_ones(checkpoint, check, monkeypatch):
    folder, _ = checkpoint("llama3.2")
    monkeypatch.setattr(host_offload, "_MIN_BYTES", 1)  # send the small model's tensors too
    check(replayed(folder))
