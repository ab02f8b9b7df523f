"""A base in pinned host memory: the bits of a base on the GPU, no wait of the host, two layers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora import functional as FL
from fastlora.distributed.host_shards import pinned
from fastlora.model import Model
from oracles.gpu_models import Row, adapted, tokens
from oracles.host_bases import in_host_memory

pytestmark = [pytest.mark.gpu, pytest.mark.part("offload")]
POLICIES: list[Any] = ["none", "selective", 0.4, "full", "offload"]


def gradient(model: Model) -> Any:
    ids = tokens(model, 2, 256)
    loss = lambda a, base: FL.loss(a, base, model.spec, {"input_ids": ids, "labels": ids}, seed=7)
    return fastlora.value_and_grad(loss)(model.adapter, model.base)


def differences(folder: Path) -> Iterator[Row]:
    for kind in ("bfloat16", "NF4"):
        for policy in POLICIES:
            model = adapted(folder, "bfloat16", {"lora_dropout": 0.1}, recompute=policy)
            if kind == "NF4":
                model = fastlora.quantize(model)
            for ahead in (0, 1, 2):
                streamed = in_host_memory(model)
                layers: Any = streamed.base["layers"]
                layers.prefetch = ahead
                pairs = zip(
                    tree_leaves(gradient(streamed)), tree_leaves(gradient(model)), strict=True
                )
                same = all(torch.equal(a, b) for a, b in pairs)
                yield f"{kind}, {policy}, {ahead} ahead: other bits", 0.0 if same else 1.0, 0


def waits(folder: Path) -> Iterator[Row]:
    for policy in POLICIES:
        model = in_host_memory(adapted(folder, "bfloat16", {}, recompute=policy))
        ids = tokens(model, 2, 128)
        batch = {"input_ids": ids, "labels": ids}
        step = lambda model=model, batch=batch: fastlora.value_and_grad(FL.loss)(
            model.adapter, model.base, model.spec, batch
        )
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            waited = 0.0
        except RuntimeError:
            waited = 1.0
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield f"a streamed step waits for the GPU: {policy}", waited, 0


def test_streamed_layers_give_the_same_bits(checkpoint, check):
    check(differences(checkpoint("llama3.2")[0]))


def test_a_streamed_step_does_not_wait_for_the_gpu(checkpoint, check):
    check(waits(checkpoint("llama3.2")[0]))


def test_memory_is_pinned_until_its_last_view_is_gone():
    memory = pinned(10_000, torch.device("cuda", 0))
    view = memory[5_000:]
    assert memory.is_pinned() and view.is_pinned()
    del memory
    view.fill_(3)
    assert int(view.cuda(non_blocking=True).sum()) == 15_000
