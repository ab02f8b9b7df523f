"""Milliseconds per generated token: fastlora beside transformers and Unsloth.

    python scripts/bench/decoding.py --shape 1b --settings fastlora hf-static unsloth
    python scripts/bench/decoding.py --shape 8b --load-in-4bit --out rows.jsonl
    python scripts/bench/decoding.py --shape 1b --batch 32

Each setting runs in a new process over random weights, with r = 16 on all seven projections, the
adapter not merged; "merged" is fastlora with the adapter merged into the base. Rows of the table:

    ms        time of one more token for all rows: (time of --new tokens - time of 32) / difference
    prompt    milliseconds from the call to the first token, for a prompt of --prompt tokens
    forward   milliseconds of one training forward pass over the same prompt (fastlora only)
    first     seconds from the start of Python to the first token of the process

Times are medians of --repeat calls; the spread is the largest minus the smallest.
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
from pathlib import Path
from typing import Any

import results
import torch
from random_checkpoint import SHAPES, write_checkpoint
from torch.utils._pytree import tree_map

import fastlora
from fastlora import functional as FL

SETTINGS = ("fastlora", "merged", "hf-static", "unsloth")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHORT = 32  # tokens of the shorter of the two calls that a time per token is computed from
Generate = Callable[[torch.Tensor, int], torch.Tensor]  # (ids [b, t], new tokens) -> ids


def ours(args: argparse.Namespace) -> tuple[Generate, Callable[[torch.Tensor], Any]]:
    """(generate, training forward pass) of fastlora."""
    model, _ = fastlora.load(
        str(args.folder), load_in_4bit=args.load_in_4bit, base_precision=args.base_precision
    )
    model = fastlora.lora(model, r=16, lora_alpha=16)
    generator = torch.Generator("cuda").manual_seed(0)
    noise = lambda x: (
        x + 0.01 * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    )
    model = model.with_adapter(tree_map(noise, model.adapter))
    if args.one == "merged":
        model = fastlora.merge(model)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        batch = {"input_ids": ids, "labels": ids}
        with torch.no_grad():
            return FL.loss(model.adapter, model.base, model.spec, batch)

    return lambda ids, new: model.generate(ids, max_new_tokens=new, eos_token_id=()), forward


def peer(args: argparse.Namespace) -> Generate:
    """`generate` of transformers with PEFT and a static cache, or of Unsloth."""
    if args.one == "unsloth":
        FastLanguageModel = import_module("unsloth").FastLanguageModel
        model, _ = FastLanguageModel.from_pretrained(
            str(args.folder),
            max_seq_length=4096,
            load_in_4bit=args.load_in_4bit,
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, target_modules=TARGETS)
        FastLanguageModel.for_inference(model)
    else:
        peft, transformers = import_module("peft"), import_module("transformers")
        nf4 = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        more = {"quantization_config": nf4} if args.load_in_4bit else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            args.folder, dtype=torch.bfloat16, device_map={"": 0}, **more
        )
        lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora).eval()
    static = {"cache_implementation": "static"} if args.one == "hf-static" else {}
    return lambda ids, new: model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **static,
    )


def timed(run: Callable[[], Any], repeat: int) -> list[float]:
    """Milliseconds of each of `repeat` calls."""
    times = []
    for _ in range(repeat):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the setting `args.one` in this process and return its figures."""
    is_ours = args.one in ("fastlora", "merged")
    generate, forward = ours(args) if is_ours else (peer(args), None)
    loaded = time.time() - args.begun
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (args.batch, args.prompt), generator=generator).cuda()
    generate(ids, 1)
    torch.cuda.synchronize()
    first = time.time() - args.begun
    # Two calls of the full length: the first one compiles, or records a graph.
    generate(ids, args.new)
    generate(ids, args.new)
    generate(ids, SHORT)
    long, short = (timed(lambda n=n: generate(ids, n), args.repeat) for n in (args.new, SHORT))
    steps = args.new - SHORT
    ms = (statistics.median(long) - statistics.median(short)) / steps
    figures = {
        "setting": args.one,
        "ms": round(ms, 3),
        "spread_ms": round((max(long) - min(long)) / steps, 3),
        "tokens_s": round(1e3 * args.batch / ms),
        "prompt_ms": round(statistics.median(timed(lambda: generate(ids, 1), args.repeat)), 1),
        "load_s": round(loaded, 1),
        "first_s": round(first, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }
    if forward is not None and args.forward:
        timed(lambda: forward(ids), 3)
        figures["forward_ms"] = round(
            statistics.median(timed(lambda: forward(ids), args.repeat)), 1
        )
    return figures


def in_own_process(setting: str, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one setting, or {"setting", "error"} if its process failed."""
    command = [sys.executable, __file__, "--one", setting, "--folder", str(args.folder)]
    for name in ("shape", "batch", "prompt", "new", "repeat"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--base-precision", args.base_precision]
    command += ["--load-in-4bit"] * args.load_in_4bit + ["--forward"] * args.forward
    command += ["--begun", str(time.time())]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        return {"setting": setting, "error": done.stderr.strip().splitlines()[-3:]}
    return json.loads(lines[0].removeprefix("RESULT "))


def command_of(setting: str, args: argparse.Namespace) -> str:
    """The command that measures this setting alone."""
    words = [f"python scripts/bench/decoding.py --shape {args.shape} --batch {args.batch}"]
    words += [f"--prompt {args.prompt} --new {args.new} --repeat {args.repeat}"]
    words += ["--load-in-4bit"] * args.load_in_4bit + ["--forward"] * args.forward
    words += ["--base-precision fp8"] * (args.base_precision == "fp8")
    words += ["--settings", setting]
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens that are generated")
    parser.add_argument("--repeat", type=int, default=5, help="timed calls")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument(
        "--base-precision", choices=["checkpoint", "fp8"], default="checkpoint", help="fastlora's"
    )
    parser.add_argument("--forward", action="store_true", help="time a training forward pass too")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["fastlora"])
    parser.add_argument("--folder", type=Path, help="an existing checkpoint")
    parser.add_argument("--out", type=Path, help="append rows as in scripts/bench/results.jsonl")
    parser.add_argument("--one", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(args)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("decoding.py measures on a CUDA GPU, and this machine has none.")
    with tempfile.TemporaryDirectory() as made:
        if args.folder is None:
            args.folder = Path(made)
            write_checkpoint(SHAPES[args.shape], args.folder)
        for setting in args.settings:
            figures = in_own_process(setting, args)
            print(json.dumps(figures), flush=True)
            if args.out is not None and "error" not in figures:
                results.append(args.out, results.row(command_of(setting, args), figures))


if __name__ == "__main__":
    main()
