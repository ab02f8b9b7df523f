"""Profile 1B "none" and "offload" in one process: kernels by time, busy, span, time without profiler.

    python probes/p1.py      (about 55 s on one H200; needs no other file than this checkout)
"""
import argparse, statistics, sys, tempfile, time
from itertools import pairwise
from pathlib import Path

T0 = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]
import torch
from torch.profiler import ProfilerActivity, profile
from bench_steps import step_of
from measuring import add_step_arguments, floor_ms, shape_of, token_ids
from profile_step import recorded, table
from random_checkpoint import write_checkpoint


def say(text):
    print(f"[{time.perf_counter() - T0:5.1f} s] {text}", flush=True)


def timed(step, ids, n):
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    host = time.perf_counter()
    for event in events[1:]:
        step(ids)
        event.record()
    host = time.perf_counter() - host
    torch.cuda.synchronize()
    each = [a.elapsed_time(b) for a, b in pairwise(events)]
    return f"median {statistics.median(each):.1f} ms, {min(each):.1f} to {max(each):.1f}; host enqueues a step in {1e3 * host / n:.1f} ms"


def main():
    parser = argparse.ArgumentParser()
    add_step_arguments(parser)
    args = parser.parse_args(["--shape", "1b"])
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = Path(temporary)
        write_checkpoint(shape_of(args), args.folder)
        say("checkpoint written")
        ids = token_ids(args)
        for setting, graph, most in (("none", False, 70), ("none", True, 0), ("offload", False, 45)):
            args.one, args.cuda_graph = setting, graph
            step = step_of(args)
            for _ in range(4):
                step(ids)
            torch.cuda.synchronize()
            say(f"1B {setting}{', graph' if graph else ''}: {timed(step, ids, 12)}")
            if most:
                with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
                    for _ in range(2):
                        step(ids)
                    torch.cuda.synchronize()
                kernels, waits = recorded(prof.events() or [])
                say("profile\n" + table(kernels, waits - 1, 2, floor_ms(shape_of(args), 4, 2048), most))
            del step


main()
