"""Bases in 4 and 8 bits on the GPU: bytes, parity, gradients, memory, files, training.

bf16 rows hold fastlora's error over the error of the dense model, of transformers or of PEFT on the
same dequantised weights, all against fp32.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fastlora
from fastlora import functional as FL
from fastlora.checkpoints.hub import DEMO
from fastlora.data.rows import read_rows
from fastlora.model import Model
from fastlora.models.names import projection_weights, tensors_from_base
from fastlora.ops.quant.bitsandbytes import dequantize_by_bitsandbytes, quantize_4bit
from fastlora.ops.quant.dequantize import dense, dequantize
from fastlora.ops.quant.weights import Quantized
from oracles.checkpoints import make_checkpoint
from oracles.gpu_models import SIZES, Row, relative, tokens

pytestmark = pytest.mark.gpu
POLICIES: list[Any] = ["none", "selective", 0.4, "full", "offload"]


def nf4(**more: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **more,
    )


def twin(model: Model, dtype: torch.dtype) -> Model:
    """The model with its dequantised weights held dense, all of it in `dtype`."""

    def whole(x: Any) -> Any:
        if isinstance(x, dict) and isinstance(x.get("weight"), Quantized):
            x = x | {"weight": dense(x["weight"], torch.bfloat16)}
        return tree_map(lambda t: t.to(dtype), x)

    layers = tuple({n: whole(x) for n, x in layer.items()} for layer in model.base["layers"])
    ends = {n: whole(x) for n, x in model.base.items() if n != "layers"}
    base: Any = ends | {"layers": layers}
    config = replace(model.spec.config, dtype=str(dtype).removeprefix("torch."))
    return replace(model, base=base, spec=replace(model.spec, config=config))


def dequantised() -> Iterator[Row]:
    """Kernel and bitsandbytes, value for value."""
    gen = torch.Generator("cuda").manual_seed(0)
    shapes = [(4096, 4096), (1024, 4096), (33, 8), (300, 130), (33, 7), (1, 1), (14336, 4096)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for kind, nested in (("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)):
            differing = 0
            for shape in shapes:
                weight = 0.02 * torch.randn(shape, generator=gen, device="cuda")
                record = quantize_4bit(weight.to(dtype), quant_type=kind, nested=nested)
                wanted = dequantize_by_bitsandbytes(record)
                differing += int((dequantize(record, dtype) != wanted).sum())
            yield f"dequantised {kind}, nested {nested}, {dtype}: values off", float(differing), 0


def loading(folder: Path) -> Iterator[Row]:
    """Bytes and logits of transformers + bitsandbytes, quantised on load and read back."""
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nf4(), device_map={"": 0}, dtype=torch.bfloat16
    )
    ours, _ = fastlora.load(str(folder), load_in_4bit=True, device="cuda")
    state, own = theirs.state_dict(), tensors_from_base(ours.spec.config, ours.base)
    names = projection_weights(ours.spec.config)
    off = sum(int((own[n].packed != state[n].flatten()).sum()) for n in names)
    yield "loaded in 4 bits: packed bytes off transformers'", float(off), 0
    ids = tokens(ours, 2, 300)
    with torch.no_grad():
        exact = twin(ours, torch.float32)(ids)
        their, mine = theirs(ids).logits, ours(ids)
    yield (
        "bf16 logits over transformers' error",
        relative(mine, exact) / relative(their, exact),
        1.5,
    )
    with tempfile.TemporaryDirectory() as name:
        theirs.save_pretrained(name)
        again, _ = fastlora.load(name, device="cuda")
        yield "read from transformers' folder: logits off", float((again(ids) != mine).sum()), 0
        eight = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            device_map={"": 0},
            dtype=torch.bfloat16,
        )
        eight.save_pretrained(f"{name}/8")
        found, _ = fastlora.load(f"{name}/8", device="cuda")
        own = tensors_from_base(found.spec.config, found.base)
        off = 0
        for n in names:
            weight: Any = eight.get_parameter(n)
            wanted = bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
            off += int((dequantize(own[n], torch.float32) != wanted).sum())
        yield "int8: dequantised values off", float(off), 0


def gradients(folder: Path, name: str, **how: Any) -> Iterator[Row]:
    """Error of every policy, compiled, over that of the dense bf16 model run plainly."""
    base, _ = fastlora.load(str(folder), load_in_4bit=True, device="cuda")
    model = fastlora.lora(base, r=8, lora_alpha=16, init_lora_weights=False, **how)
    ids = tokens(model, 2, 256)
    batch = {"input_ids": ids, "labels": ids}
    run = lambda m: fastlora.value_and_grad(FL.loss)(m.adapter, m.base, m.spec, batch, seed=1)[1]
    plain: dict[str, Any] = dict(compile=False, recompute="none", kernels="torch")
    exact = run(twin(model, torch.float32).with_spec(**plain))
    error = relative(run(twin(model, torch.bfloat16).with_spec(**plain)), exact)
    for policy in POLICIES:
        found = run(model.with_spec(compile=True, recompute=policy))
        yield (
            f"{name} gradient, {policy}, over the dense model's error",
            (relative(found, exact) / error),
            1.5,
        )
    if not how:
        yield (
            "torch.func.grad over the dense model's error",
            relative(_func(model, batch), exact) / error,
            1.5,
        )


def _func(model: Model, batch: dict[str, Tensor]) -> Any:
    loss = lambda adapter: FL.loss(adapter, model.base, model.spec, batch)
    return torch.func.grad(loss)(model.adapter)


def memory(folder: Path) -> Iterator[Row]:
    """Matrices that the backward pass of a compiled layer was kept, by shape."""
    base, _ = fastlora.load(str(folder), load_in_4bit=True, device="cuda")
    model = fastlora.lora(base, r=8)
    own = tensors_from_base(model.spec.config, model.base)
    shapes = {tuple(own[n].form.shape[:2]) for n in projection_weights(model.spec.config)}
    ids = tokens(model, 1, 48)
    for policy in POLICIES:
        found = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal found
            size = tuple(x.shape)
            found += x.is_floating_point() and bool({size, size[::-1]} & shapes)
            return x

        adapter = tree_map(lambda x: x.detach().requires_grad_(), model.adapter)
        spec = model.with_spec(recompute=policy, compile=True).spec
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            FL.loss(adapter, model.base, spec, {"input_ids": ids, "labels": ids})
        yield f"dequantised matrices kept, {policy}", float(found), 0


def files(folder: Path) -> Iterator[Row]:
    """Merged folders, in 16 and 4 bits, in transformers."""
    base, _ = fastlora.load(str(folder), load_in_4bit=True, device="cuda")
    model = fastlora.lora(base, r=8, init_lora_weights=False)
    ids = tokens(model, 2, 64)
    with tempfile.TemporaryDirectory() as name:
        for method in ("merged_16bit", "merged_4bit"):
            report = model.save_pretrained_merged(
                f"{name}/{method}", None, method, base="dequantized"
            )
            assert report is not None
            theirs = AutoModelForCausalLM.from_pretrained(
                f"{name}/{method}", device_map={"": 0}, dtype=torch.bfloat16
            )
            again, _ = fastlora.load(f"{name}/{method}", device="cuda")
            with torch.no_grad():
                exact = twin(again, torch.float32)(ids)
                mine, their = again(ids), theirs(ids).logits
            ratio = relative(mine, exact) / relative(their, exact)
            yield f"{method}: our logits over transformers' error", ratio, 1.5
            largest = float(model(ids).abs().max())
            yield (
                f"{method}: reported difference, of the largest logit",
                (report.logit_difference / largest),
                0.1 if method == "merged_16bit" else 1.0,
            )


def training() -> Iterator[Row]:
    """The demo in 4 bits, with every optimiser, whole and resumed in the middle."""
    base, tokenizer = fastlora.load("demo", max_seq_length=256, device="cuda", load_in_4bit=True)
    model = fastlora.lora(base, r=32)
    rows = read_rows(DEMO / "train.jsonl")[:400]
    for optimizer in ("adamw", "adamw_8bit", "paged_adamw_8bit"):
        with tempfile.TemporaryDirectory() as name:
            train = partial(
                fastlora.train, model, tokenizer, rows, max_steps=12, batch_size=4,
                progress=False, optimizer=optimizer, learning_rate=2e-3,
            )  # fmt: skip
            whole, history = train(output_dir=name, save_every=6)
            resumed, _ = train(resume=f"{name}/checkpoint-6")
        fall = history.losses[-1] / history.losses[0]
        yield f"{optimizer}: last loss over the first", fall, 0.95
        # Fused attention may add in another order every run, and 8 bits make steps of it.
        limit = 1e-2 if optimizer == "adamw" else 3e-2
        yield f"{optimizer}: resumed against whole", relative(resumed.adapter, whole.adapter), limit


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """folders(family): a dense bf16 checkpoint."""

    @cache
    def of(family: str) -> Path:
        folder = tmp_path_factory.mktemp("4bit") / family
        make_checkpoint(family, folder, torch.bfloat16, config=SIZES)
        return folder

    return of


PARTS = [pytest.param(f, marks=pytest.mark.part(f"4bit-{f}")) for f in ("llama3.2", "qwen2")]
LLAMA = pytest.mark.part("4bit-llama3.2")


@pytest.mark.part("4bit-training")
def test_dequantised_values_are_those_of_bitsandbytes(check):
    check(dequantised())


@pytest.mark.part("4bit-training")
def test_training_with_every_optimizer_lowers_the_loss_and_resumes(check):
    check(training())


@pytest.mark.parametrize("family", PARTS)
def test_loaded_bytes_and_logits_are_those_of_transformers(family, folders, check):
    check(loading(folders(family)))


@pytest.mark.parametrize("family", PARTS)
def test_gradients_err_no_more_than_the_dense_model(family, folders, check):
    check(gradients(folders(family), family))


@LLAMA
def test_no_dequantised_matrix_is_kept_for_the_backward_pass(folders, check):
    check(memory(folders("llama3.2")))


@LLAMA
def test_merged_folders_load_in_transformers(folders, check):
    check(files(folders("llama3.2")))


@LLAMA
@pytest.mark.parametrize(
    ("name", "how"), [("DoRA", dict(use_dora=True)), ("dropout", dict(lora_dropout=0.1))]
)
def test_gradients_of_variants_err_no_more_than_the_dense_model(name, how, folders, check):
    check(gradients(folders("llama3.2"), name, **how))
