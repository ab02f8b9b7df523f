"""Time and memory of a training step: fastlora's recompute policies beside other libraries.

    python scripts/bench.py --shape 1b                   # every recompute policy, and the peers
    python scripts/bench.py --shape 8b --recompute none full --peers hf --out rows.jsonl
    python scripts/bench.py --shape 8b --load-in-4bit --batch 2 --peers unsloth-gc liger-gc
    python scripts/bench.py --shape 8b --base-precision fp8 --recompute none --cuda-graph --peers
    python scripts/bench.py --shape 1b --targets q_proj v_proj --recompute none --peers unsloth
    python scripts/bench.py --shape 1b --chats --warm 6 --recompute none --peers unsloth
    python scripts/bench.py --shape 1b --energy 5 --recompute none --cuda-graph --peers unsloth

Each setting runs in a new process. Every step sees the same random tokens, unless --chats is given.
Steps run back to back, as in training, and CUDA events time them. The table gives the median of
--steps after --warm; "spread" is the slowest step minus the fastest.

Peers: transformers + PEFT ("hf"), the same compiled ("hf-compile"), with Liger's kernels ("liger"),
and Unsloth ("unsloth"; "unsloth-fp8" over its base in fp8). A name with "-gc" uses gradient
checkpointing. "probe" is scripts/bench/probe.py: the same step in plain compiled PyTorch.

With --cuda-graph, fastlora's step is recorded once and replayed
(value_and_grad(cuda_graph=True)). The peak then covers the whole process, because a graph allocates
its memory while it is recorded.

With --chats the steps go through six batches of packed chats of ragged length; "tokens/s" counts
tokens without padding, and the floor takes each row as one document. With --energy the rows also
have the energy of 1,000 tokens in joules, the mean power and the clock, from NVML.

The last two columns are the speed relative to --against, and the floor's share of the step. The
floor is the time that the arithmetic alone takes at 790 TFLOP/s; see measuring.floor_ms.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import results
from measuring import (
    add_step_arguments,
    add_timing_arguments,
    command_of,
    facts,
    in_own_process,
    on_one_line,
    shape_of,
)
from random_checkpoint import write_checkpoint

POLICIES = ["none", "selective", "0.6", "0.4", "0.2", "full", "offload"]


def report(title: dict, rows: list[dict], against: str) -> str:
    """A table with one line per setting, compared with the peer `against` if that ran."""
    lines = ["", on_one_line(title)]
    lines += [
        f"{'setting':<12}{'ms':>8}{'spread':>8}{'tokens/s':>10}{'GiB':>8}{'first s':>9}"
        f"{'x ' + against:>14}{'floor':>8}"
    ]
    peer = next((r for r in rows if r["setting"] == against and "ms" in r), None)
    for r in rows:
        if "error" in r:
            lines += [f"{r['setting']:<12}{r['error']}"]
            continue
        ratio = f"{peer['ms'] / r['ms']:.2f}" if peer else ""
        lines += [
            f"{r['setting']:<12}{r['ms']:>8}{r['spread_ms']:>8}{r['tokens_s']:>10}"
            f"{r['peak_gib']:>8}{r['first_s']:>9}{ratio:>14}{r['floor_ms'] / r['ms']:>8.0%}"
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_step_arguments(parser)
    add_timing_arguments(parser)
    parser.add_argument("--recompute", nargs="*", default=POLICIES)
    parser.add_argument("--peers", nargs="*", default=["probe", "hf", "hf-gc"])
    parser.add_argument("--against", help="peer to compare with; default: the first of --peers")
    parser.add_argument("--cache", type=Path, help="compile cache to share; first steps are warm")
    parser.add_argument("--out", type=Path, help="append rows as in scripts/bench/results.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.py measures on a CUDA GPU, and this machine has none.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not args.folder:
            write_checkpoint(shape_of(args), folder)
        rows = []
        for setting in [*args.recompute, *args.peers]:
            rows.append(in_own_process(setting, folder, args))
            print(rows[-1], flush=True)
            if args.out and "error" not in rows[-1]:
                results.append(args.out, results.row(command_of(setting, args), rows[-1]))
    print(report(facts(args), rows, args.against or next(iter(args.peers), "")))


if __name__ == "__main__":
    main()
