"""The training step that scripts/bench.py measures: fastlora's, and each peer's for the same work.

A step is forward, backward and fused AdamW on the adapters. fastlora keeps adapters in fp32, as
Unsloth does over a 4-bit base; the other peers keep them in bf16. step_batches.py makes the
batches. A setting is one of fastlora's recompute policies, a number, "probe", or a peer's name,
with "-gc" for gradient checkpointing.
"""

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from probe import probe_step
from random_checkpoint import SHAPES
from step_batches import PEERS, Batch
from training_step import training_step

import fastlora
from fastlora import functional as FL

Step = Callable[[Batch], torch.Tensor]  # a batch of step_batches.py -> loss


def step_of(args: argparse.Namespace) -> Step:
    """Load the model of the setting `args.one` and return its step."""
    if args.one == "probe":
        probe = probe_step(SHAPES[args.shape], args.rank, "cuda")
        return lambda batch: probe(batch["input_ids"])
    return peer(args) if args.one.startswith(PEERS) else ours(args)


def ours(args: argparse.Namespace) -> Step:
    model, _ = fastlora.load(
        str(args.folder), load_in_4bit=args.load_in_4bit, base_precision=args.base_precision
    )
    model = fastlora.lora(
        model,
        recompute=float(args.one) if args.one[0].isdigit() else args.one,
        **settings(args),
        lora_bias=args.lora_bias,
    )
    model = model.with_spec(kernels=args.kernels, deterministic=args.deterministic)
    value_and_grad = fastlora.value_and_grad(FL.loss, cuda_graph=args.cuda_graph)
    _, update = training_step(model.adapter, value_and_grad, 2e-4)
    steps = 0

    def step(batch: Batch) -> torch.Tensor:
        nonlocal steps
        steps += 1  # also the seed of this step's dropout
        seed = torch.full((), steps, device=batch["input_ids"].device)
        return update(model.base, model.spec, batch, seed=seed)

    return step


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """LoRA arguments that have the same names in fastlora, PEFT and Unsloth."""
    optional = {"use_dora": True} if args.use_dora else {}
    return dict(
        r=args.rank,
        lora_alpha=args.rank,
        target_modules=args.targets,
        lora_dropout=args.dropout,
        **optional,
    )


def peer(args: argparse.Namespace) -> Step:
    model = _unsloth(args) if args.one.startswith("unsloth") else _transformers(args)
    params = [p for p in model.parameters() if p.requires_grad]
    run = torch.compile(model) if args.one == "hf-compile" else model
    optimizer = torch.optim.AdamW(params, lr=2e-4, fused=True)

    def step(batch: Batch) -> torch.Tensor:
        loss = run(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _transformers(args: argparse.Namespace) -> Any:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415  peers are optional
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: PLC0415

    if args.one.startswith("liger"):
        import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
    more = {}
    if args.load_in_4bit:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa", **more
    )
    model.config.use_cache = False
    if args.one.endswith("-gc"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(**settings(args), lora_bias=args.lora_bias, task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False).train()


def _unsloth(args: argparse.Namespace) -> Any:
    of_unsloth = import_module("unsloth").FastLanguageModel  # patches transformers on import
    model, _ = of_unsloth.from_pretrained(
        str(args.folder),
        max_seq_length=args.seq,
        load_in_4bit=args.load_in_4bit,
        dtype=torch.bfloat16,
        local_files_only=True,
        **({"load_in_fp8": True} if "-fp8" in args.one else {}),
    )
    return of_unsloth.get_peft_model(
        model,
        **settings(args),
        bias="none",
        use_gradient_checkpointing="unsloth" if args.one.endswith("-gc") else False,
    ).train()
