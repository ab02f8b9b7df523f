"""Step time, tokens/s, peak memory and first-step time of a training step, beside its peers.

    python scripts/bench.py --shape 1b                   # every recompute policy, and the peers
    python scripts/bench.py --shape 8b --recompute none full --peers hf --out results.jsonl
    python scripts/bench.py --shape 8b --load-in-4bit --batch 2 --peers unsloth-gc liger-gc

One setting, one process. Every step: the same random tokens, labels = tokens, forward, backward,
fused AdamW on r = 16 adapters of all seven projections. Steps run back to back, as in training; a
CUDA event after each gives its time. Median of --steps after --warm; spread is the slowest step
less the fastest. The peers do the same work: transformers + PEFT ("hf"), compiled ("hf-compile"),
with Liger's kernels ("liger"), and Unsloth ("unsloth"); with "-gc" after it, with gradient
checkpointing. "probe" is bench_results/probe.py, the same step written as plainly as torch.compile
allows. Ours keeps adapters in fp32, Unsloth over a base in 4 bits too, the others in bf16. Unsloth
wants a tokenizer beside the checkpoint.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_results.probe import probe_step
from random_checkpoint import SHAPES, write_checkpoint
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import fastlora
from fastlora import functional as FL

POLICIES = ["none", "selective", "0.6", "0.4", "0.2", "full", "offload"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = ("use_dora", "lora_bias", "load_in_4bit")
Step = Callable[[torch.Tensor], torch.Tensor]


def ours(args: argparse.Namespace) -> Step:
    model, _ = fastlora.load(str(args.folder), load_in_4bit=args.load_in_4bit)
    recompute: Any = float(args.one) if args.one[0].isdigit() else args.one
    more: dict[str, Any] = {name: True for name in ("use_dora", "lora_bias") if getattr(args, name)}
    model = fastlora.lora(model, r=args.rank, lora_alpha=args.rank, recompute=recompute, **more)
    model = model.with_spec(kernels=args.kernels)
    leaves, structure = tree_flatten(model.adapter)
    params = [leaf.clone() for leaf in leaves]
    optimizer = torch.optim.AdamW(params, lr=2e-4, fused=True)
    value_and_grad = fastlora.value_and_grad(FL.loss)

    def step(ids: torch.Tensor) -> torch.Tensor:
        batch = {"input_ids": ids, "labels": ids}
        adapter = tree_unflatten(params, structure)
        value, grads = value_and_grad(adapter, model.base, model.spec, batch)
        for param, grad in zip(params, tree_leaves(grads), strict=True):
            param.grad = grad
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def probe(args: argparse.Namespace) -> Step:
    return probe_step(SHAPES[args.shape], args.rank, "cuda")


def peer(args: argparse.Namespace) -> Step:
    model = _unsloth(args) if args.one.startswith("unsloth") else _transformers(args)
    params = [p for p in model.parameters() if p.requires_grad]
    run = torch.compile(model) if args.one == "hf-compile" else model
    optimizer = torch.optim.AdamW(params, lr=2e-4, fused=True)

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _transformers(args: argparse.Namespace) -> Any:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415  only where a peer runs
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
    config = LoraConfig(
        r=args.rank, lora_alpha=args.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False).train()


def _unsloth(args: argparse.Namespace) -> Any:
    of_unsloth = import_module("unsloth").FastLanguageModel  # patches transformers on import
    model, _ = of_unsloth.from_pretrained(
        str(args.folder),
        max_seq_length=args.seq,
        load_in_4bit=args.load_in_4bit,
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    return of_unsloth.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=args.rank,
        target_modules=TARGETS,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if args.one.endswith("-gc") else False,
    ).train()


def measure(args: argparse.Namespace) -> dict:
    """One setting, in this process."""
    peers = ("hf", "liger", "unsloth")
    make = probe if args.one == "probe" else peer if args.one.startswith(peers) else ours
    start = time.perf_counter()
    step = make(args)
    torch.cuda.synchronize()
    load, of_loading = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128256, (args.batch, args.seq), generator=generator).cuda()
    start = time.perf_counter()
    losses = [step(ids)]
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in range(args.warm):
        step(ids)
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    events[0].record()
    for event in events[1:]:
        losses.append(step(ids))
        event.record()
    torch.cuda.synchronize()
    timed = [a.elapsed_time(b) for a, b in pairwise(events)]
    median = statistics.median(timed)
    return {
        "setting": args.one,
        "ms": round(median, 1),
        "spread_ms": round(max(timed) - min(timed), 1),
        "tokens_s": round(1e3 * args.batch * args.seq / median),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "first_s": round(first, 1),
        "load_s": round(load, 1),
        "load_gib": round(of_loading / 2**30, 2),
        "loss": [round(float(losses[0]), 4), round(float(losses[-1]), 4)],
    }


def in_own_process(setting: str, folder: Path, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--one", setting, "--folder", str(folder)]
    for name in ("shape", "batch", "seq", "rank", "steps", "warm", "kernels"):
        command += [f"--{name}", str(getattr(args, name))]
    command += [f"--{n.replace('_', '-')}" for n in OPTIONS if getattr(args, n)]
    with tempfile.TemporaryDirectory() as cold:  # a compile cache of its own: first steps are cold
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cold}
        if args.cache:
            env["TORCHINDUCTOR_CACHE_DIR"] = str(args.cache)
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        return {"setting": setting, "error": done.stderr.strip().splitlines()[-3:]}
    return json.loads(lines[0].removeprefix("RESULT "))


def how(args: argparse.Namespace) -> dict:
    """What a line of results must say beside the setting."""
    device = torch.cuda.get_device_name()
    options = {n: True for n in OPTIONS if getattr(args, n)}
    versions = {"torch": torch.__version__, "device": device}
    sizes = {"shape": args.shape, "batch": args.batch, "seq": args.seq, "kernels": args.kernels}
    return sizes | options | versions


def report(rows: list[dict], args: argparse.Namespace) -> None:
    versions = f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    print(f"\n{args.shape}, batch {args.batch} x {args.seq}, r = {args.rank}, bf16; {versions}")
    print(f"{'setting':<12}{'ms':>8}{'±':>6}{'tokens/s':>10}{'GiB':>8}{'first s':>9}{'vs hf':>8}")
    reference = next((r["ms"] for r in rows if r["setting"] == "hf" and "ms" in r), None)
    for r in rows:
        if "error" in r:
            print(f"{r['setting']:<12}{r['error']}")
            continue
        ratio = f"{reference / r['ms']:.2f}x" if reference else ""
        print(
            f"{r['setting']:<12}{r['ms']:>8}{r['spread_ms']:>8}{r['tokens_s']:>10}"
            f"{r['peak_gib']:>8}{r['first_s']:>9}{ratio:>8}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, help="a checkpoint that is there already")
    parser.add_argument("--recompute", nargs="*", default=POLICIES)
    parser.add_argument("--peers", nargs="*", default=["probe", "hf", "hf-gc"])
    parser.add_argument("--kernels", choices=["auto", "torch"], default="auto")
    for name in OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="compile cache; first steps are then not cold")
    parser.add_argument("--out", type=Path, help="append one JSON line per setting")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(args)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench.py measures on a CUDA GPU; there is none here.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not args.folder:
            write_checkpoint(args.shape, folder)
        rows = []
        for setting in [*args.recompute, *args.peers]:
            rows.append(how(args) | in_own_process(setting, folder, args))
            print(rows[-1], flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    report(rows, args)


if __name__ == "__main__":
    main()
