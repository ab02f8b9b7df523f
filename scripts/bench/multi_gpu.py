"""What only several GPUs can tell: links, overlap, scaling, memory, and a rank that is killed.

    python scripts/bench/multi_gpu.py                                # all parts, on all GPUs
    python scripts/bench/multi_gpu.py --ranks 2 --parts bandwidth products bf16
    python scripts/bench/multi_gpu.py --ranks 2 --parts bf16 --nccl  # no copies of peers' memory
    torchrun --nproc-per-node 8 scripts/bench/multi_gpu.py --parts nf4
    python scripts/bench/multi_gpu.py --tiny --ranks 2               # gloo on the CPU: does it run?

Each part is a job of its own, so that one that hangs ends after --seconds and the next goes on.
Rows are printed and go to $OUT/multi_gpu.jsonl (or --out) as they are measured; the table of all
parts so far follows each part. "transfers" of a trace are NCCL's kernels, and copies of a MiB or
more (trace_overlap.py).

bandwidth   all_gather and all_reduce, 1 MiB to 1.7 GiB
products    what matrix products lose while all_gathers run beside them
bf16, nf4   8B, 4 x 2048 tokens a rank. Data parallel from 1 rank to all; sharded, and with 4 or
            more ranks hybrid, with 0, 1 and 2 layers gathered ahead; peaks beside `plan`; a trace
70b         70B in NF4, 1 x 2048 tokens, sharded over all ranks, with 0 and 1 layers ahead
context     one row of 65,536 tokens of 1B in bf16: by one rank, and by all ranks together
kill        a rank is killed, torchrun starts all again, the run ends with the same bits
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Before torch: NVLink multicast may put a shared host's GPUs out of service.
os.environ |= dict(
    NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1", NVSHMEM_DISABLE_NVLS="1"
)

import torch

HERE = Path(__file__).resolve()
PARTS = ("bandwidth", "products", "bf16", "nf4", "70b", "context", "kill")


def main() -> None:
    args = arguments()
    if "RANK" in os.environ:
        work(args)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.unlink(missing_ok=True)
    for part in args.parts:
        if part == "kill":
            killed(args)
        else:
            launch(args, [str(HERE), *options(args), "--parts", part], part)
        print(table(args.out), flush=True)  # of all parts so far


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--tiny", action="store_true", help="a tiny model; works on the CPU")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--row", type=int, default=65536, help="tokens of context's row")
    parser.add_argument("--row-shape", default="1b", help="of context's model")
    parser.add_argument("--runs", type=int, default=5, help="timed steps; of 70B at most 2")
    parser.add_argument("--recompute", default="selective")
    parser.add_argument("--recompute-70b", default="full")
    parser.add_argument(
        "--nccl", action="store_true", help="all-gathers, not copies of peers' memory"
    )
    parser.add_argument("--seconds", type=float, default=240, help="of a part, at most")
    default = Path(os.environ.get("OUT", ".")) / "multi_gpu.jsonl"
    parser.add_argument("--out", type=Path, default=default)
    return parser.parse_args()


def options(args: argparse.Namespace) -> list[str]:
    """The command line of a part."""
    given = [f"--{name}" for name in ("tiny", "nccl") if getattr(args, name)]
    names = ("shape", "layers", "batch", "length", "row", "row_shape", "runs", "recompute")
    for name in (*names, "recompute_70b", "out"):
        if getattr(args, name) is not None:
            given += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return given


def launch(args: argparse.Namespace, command: list[str], part: str, *more: str) -> bool:
    """Run a command on all ranks; writes a row if it fails. Returns whether it succeeded."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(args.ranks), *more]
    try:
        code = subprocess.run([*torchrun, *command], timeout=args.seconds).returncode
        error = f"exit status {code}" if code else ""
    except subprocess.TimeoutExpired:
        error = f"took more than {args.seconds:g} s"
    if error:
        note(args.out, part=part, name="job", error=error)
    return not error


def note(out: Path, **row: Any) -> None:
    """Append a row."""
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def work(args: argparse.Namespace) -> None:
    """In a rank: the parts that were asked for."""
    from several_gpus.bench import Bench  # noqa: PLC0415
    from several_gpus.context import context  # noqa: PLC0415
    from several_gpus.steps import Sizes, steps  # noqa: PLC0415
    from several_gpus.wire import bandwidth, products  # noqa: PLC0415

    from fastlora.distributed.launch import own_device  # noqa: PLC0415

    cuda = torch.cuda.is_available()
    device = own_device(torch.device("cuda" if cuda else "cpu"))
    card = torch.cuda.get_device_name(device) if cuda else "CPU"
    title = {"ranks": int(os.environ["WORLD_SIZE"]), "card": card, "torch": torch.__version__}
    bench = Bench(args.out, device, title)
    sizes = Sizes(args.batch, args.length, args.runs, args.recompute, args.layers, args.nccl)
    if args.tiny:
        sizes = Sizes(2, 32, 2, "selective", None, args.nccl)
    shape = "tiny" if args.tiny else args.shape
    recompute = "selective" if args.tiny else args.recompute_70b
    of_70b = sizes._replace(batch=1, runs=min(2, sizes.runs), recompute=recompute)
    of_row = sizes._replace(length=args.row if not args.tiny else 64, runs=1)
    run = {
        "bandwidth": lambda: bandwidth(bench, args.tiny),
        "products": lambda: products(bench, args.tiny),
        "bf16": lambda: steps(bench, shape, False, sizes),
        "nf4": lambda: steps(bench, shape, True, sizes),
        "context": lambda: context(bench, "tiny" if args.tiny else args.row_shape, of_row),
        "70b": lambda: steps(bench, "tiny" if args.tiny else "70b", True, of_70b, False),
    }
    for part in args.parts:
        if part in run:
            run[part]()
    torch.distributed.barrier(group=bench.host)


def killed(args: argparse.Namespace) -> None:
    """A run, and the same run with a rank that is killed after step 5; writes a row."""
    script = str(HERE.parent / "several_gpus/kill.py")
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        if not launch(args, [script, str(whole)], "kill"):
            return
        if not launch(args, [script, str(cut), "--kill", "5"], "kill", "--max-restarts", "1"):
            return
        name = "adapter_model.safetensors"
        same = (whole / name).read_bytes() == (cut / name).read_bytes()
    note(args.out, ranks=args.ranks, part="kill", name="killed and resumed", same_bits=same)


def table(out: Path) -> str:
    """All rows as a Markdown table: part, measurement, figures."""
    lines = ["| part | measurement | figures |", "|---|---|---|"]
    for line in out.read_text().splitlines() if out.exists() else []:
        row = json.loads(line)
        left_out = ("part", "name", "card", "torch", "ranks", "bits")
        shown = ", ".join(f"{k} {v}" for k, v in row.items() if k not in left_out and v is not None)
        lines.append(f"| {row['part']} | {row['name']} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
