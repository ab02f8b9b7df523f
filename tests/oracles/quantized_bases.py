"""Bases in 4 and 8 bits, and what transformers with bitsandbytes makes of the same folder.

On CPUs with AVX512-BF16 bitsandbytes repacks a layer at its first evaluation and multiplies in
another way from then on. For that reason these oracles stay in training mode.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fastlora
from fastlora.model import Model
from fastlora.models.names import projection_weights, tensors_from_base
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.quant.weights import Quantized
from oracles.bitsandbytes_cpu import plain_dequantisation
from oracles.trees import token_ids

FAMILY = "llama_bias"
IDS = token_ids(2, 11)
BATCH = {"input_ids": IDS, "labels": IDS}


def how(kind: str, dtype: torch.dtype, **more: Any) -> BitsAndBytesConfig:
    """transformers' own settings for a kind of base."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind.removesuffix(" nested"),
        bnb_4bit_use_double_quant=kind.endswith("nested"),
        bnb_4bit_compute_dtype=dtype,
        **more,
    )


def oracle(folder: Path, kind: str, dtype: torch.dtype, **more: Any) -> Any:
    """transformers' reading with bitsandbytes."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how(kind, dtype, **more), device_map="cpu", dtype=dtype
    )
    return model.train()  # no dropout in these families


def load(folder: Path | str, **more: Any) -> Model:
    return fastlora.load(str(folder), device="cpu", **more)[0]


def quantised_difference(folder: Path, dtype: torch.dtype) -> float | None:
    """Largest difference of logits of 7 tokens from transformers', both quantised on load, over
    max(1, absmax); None for a mixture, which is refused."""
    plain = load(folder)
    if any(plain.spec.config.sparse_layers):
        return None
    ids = token_ids(2, 7, vocab_size=plain.spec.config.vocab_size)
    with torch.no_grad(), plain_dequantisation():
        theirs = oracle(folder, "nf4 nested", dtype)(ids).logits
        ours = load(folder, load_in_4bit=True)(ids)
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


def dense_twin(model: Model) -> Model:
    """The same model with the dequantised weights held dense."""
    dtype = model.base["norm"].dtype

    def dequantised(x: Any) -> Any:
        if isinstance(x, dict) and isinstance(x.get("weight"), Quantized):
            return x | {"weight": dense(x["weight"], dtype)}
        return x

    layers = tuple({n: dequantised(x) for n, x in layer.items()} for layer in model.base["layers"])
    return replace(model, base=model.base | {"layers": layers})


def weights(model: Model) -> dict[str, Any]:
    tensors = tensors_from_base(model.spec.config, model.base)
    return {name: tensors[name] for name in projection_weights(model.spec.config)}


SETTINGS = {
    "plain": {},
    "some": dict(target_modules=["q_proj", "up_proj"]),
    "DoRA": dict(use_dora=True),
    "lora_bias": dict(lora_bias=True),
    "bias": dict(bias="all"),
    "dropout": dict(lora_dropout=0.3),
    "norms and head": dict(modules_to_save=["norm", "lm_head"]),
    "pissa": dict(init_lora_weights="pissa"),
}


def _module(name: str) -> str:
    return f"{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
