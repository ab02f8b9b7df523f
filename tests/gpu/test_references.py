"""Logits, gradients and greedy ids on the GPU, against transformers' and PEFT's."""

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora import functional as FL
from oracles.gpu_models import MIXTURES, Row, adapted, families, median_token, relative, tokens

pytestmark = pytest.mark.gpu


def parity(family: str, folder: Path, theirs: Any) -> Iterator[Row]:
    """Logits in bf16, against transformers' in bf16, both against transformers' in fp32."""
    ours, _ = fastlora.load(str(folder), dtype="bfloat16", device="cuda")
    how = {}
    if ours.spec.config.attention_cap is not None:  # some versions of theirs leave it out in SDPA
        how["attn_implementation"] = "eager"
        theirs.set_attn_implementation("eager")
    # Read again: .float() of `theirs` and back would round the rotary tables too.
    wide = type(theirs).from_pretrained(folder, dtype=torch.float32, **how).cuda()
    ids = tokens(ours, 2, 300)
    mask = torch.ones_like(ids)
    mask[0, :90] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cases: dict[str, dict[str, Any]] = {"plain": {}, "left-padded": {"attention_mask": mask}}
    for case, given in cases.items():
        extra = given | ({"position_ids": positions} if given else {})
        real = mask.bool() if given else torch.ones_like(mask, dtype=torch.bool)
        with torch.no_grad():
            exact = wide(ids, **extra).logits[real]
            their = theirs(ids, **extra).logits[real]
        mine = ours(ids, **given)[real]
        error = median_token if family in MIXTURES else relative
        yield f"{family} bf16 logits, {case}", error(mine, exact) / error(their, exact), 1.5


def against_peft(folder: Path) -> Iterator[Row]:
    """bf16 gradients of adapter matrices: ours and PEFT's error against fp32 PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = adapted(folder, "bfloat16")
    ids = tokens(model, 2, 256)
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        grads = {}
        for dtype in (torch.float32, torch.bfloat16):
            base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            peft = PeftModel.from_pretrained(base.cuda(), name, is_trainable=True)
            peft(input_ids=ids, labels=ids).loss.backward()
            grads[dtype] = {n: p.grad for n, p in peft.named_parameters() if p.grad is not None}
    batch = {"input_ids": ids, "labels": ids}
    _, mine = fastlora.value_and_grad(FL.loss)(model.adapter, model.base, model.spec, batch)
    exact, theirs = grads[torch.float32], grads[torch.bfloat16]
    q, a = "base_model.model.model.layers.{}.{}.lora_{}.default.weight", mine["layers"]
    worst = 0.0
    for layer, name, side in ((0, "q_proj", "A"), (1, "v_proj", "B"), (0, "down_proj", "A")):
        block = "mlp" if name == "down_proj" else "self_attn"
        key = q.format(layer, f"{block}.{name}", side)
        leaf = getattr(a[layer][name], side.lower())
        worst = max(worst, relative(leaf, exact[key]) / relative(theirs[key], exact[key]))
    yield "bf16 gradients against PEFT's", worst, 1.5


def generation(folder: Path, theirs: Any) -> Iterator[Row]:
    model, _ = fastlora.load(str(folder), dtype="float32", device="cuda")
    ids = tokens(model, 2, 40)
    mine = model.generate(ids, max_new_tokens=40, eos_token_id=())
    wide = type(theirs).from_pretrained(folder, dtype=torch.float32).cuda()
    their = wide.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=-1)
    yield "greedy ids that differ from transformers'", float((mine != their).sum()), 0


def originals(folder: Path) -> Iterator[Row]:
    """Originals of trained copies leave the GPU, and come back."""
    base, _ = fastlora.load(str(folder), dtype="bfloat16", device="cuda")
    ids = tokens(base, 2, 64)
    copies = ["embed_tokens", "lm_head"]
    expected = base(ids)  # before the memory is read: the first product allocates a workspace
    before = torch.cuda.memory_allocated()
    with tempfile.TemporaryDirectory() as name:
        kept = fastlora.lora(base, r=8, modules_to_save=copies, temporary_location=name)
        held = len(list(Path(name).iterdir()))
        disabled, merged = fastlora.disable(kept)(ids), fastlora.merge(kept)(ids)
        differing = float((disabled != expected).sum() + (merged != expected).sum())
        del base
        grown = (torch.cuda.memory_allocated() - before) / 2**20
        matrices = 2 * 2 * kept.spec.config.vocab_size * kept.spec.config.hidden_size / 2**20
        adapter = sum(x.numel() * x.element_size() for x in tree_leaves(kept.adapter)) / 2**20
        yield "originals: files that are not there", float(2 - held), 0
        yield "originals: logits that differ, disabled or merged", differing, 0
        yield "originals: MiB beyond the adapter, less both matrices", grown - adapter + matrices, 1
        del kept
        gc.collect()
        yield "originals: files left behind", float(len(list(Path(name).iterdir()))), 0


@pytest.mark.parametrize("family", families())
def test_logits_err_no_more_than_transformers(family, checkpoint, check):
    check(parity(family, *checkpoint(family)))


@pytest.mark.part("llama3.2")
def test_gradients_err_no_more_than_peft(checkpoint, check):
    folder, _ = checkpoint("llama3.2")
    check(against_peft(folder))


@pytest.mark.part("llama3.2")
def test_greedy_ids_equal_transformers(checkpoint, check):
    check(generation(*checkpoint("llama3.2")))


@pytest.mark.part("mistral")
def test_originals_leave_the_gpu_and_come_back(checkpoint, check):
    folder, _ = checkpoint("mistral")
    check(originals(folder))
