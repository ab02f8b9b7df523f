"""recompute="offload" in a CUDA graph, and with more attention tensors sent: 1B, 4 x 2048.

    python probes/p4.py      (about 55 s on one H200)

Rows: the time a step takes, its peak of GPU memory, whether the graph's gradients equal the plain
ones to the bit, and the host's time to launch a step whose GPU work is tiny (1 x 64 tokens).
"""
import argparse, statistics, sys, tempfile, time, traceback
from itertools import pairwise
from pathlib import Path

T0 = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]
import torch
import fastlora
from fastlora import functional as FL
from fastlora.models import levels
from measuring import add_step_arguments, shape_of, token_ids
from random_checkpoint import write_checkpoint
from torch.utils._pytree import tree_leaves


def say(text):
    print(f"[{time.perf_counter() - T0:5.1f} s] {text}", flush=True)


def timed(step, n):
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    each = [a.elapsed_time(b) for a, b in pairwise(events)]
    return f"median {statistics.median(each):6.1f} ms, {min(each):.1f} to {max(each):.1f}"


def grads_of(run, model, batch):
    return tree_leaves(run(model.adapter, model.base, model.spec, batch)[1])


def main():
    parser = argparse.ArgumentParser()
    add_step_arguments(parser)
    args = parser.parse_args(["--shape", "1b"])
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        write_checkpoint(shape_of(args), Path(temporary))
        model, _ = fastlora.load(temporary)
    model = fastlora.lora(model, r=16, lora_alpha=16, recompute="offload")
    ids = token_ids(args)
    batch = {"input_ids": ids, "labels": ids}
    gib = lambda: f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB, reserved {torch.cuda.max_memory_reserved() / 2**30:.2f}"
    plain = fastlora.value_and_grad(FL.loss)
    for ratio in (13_000, 8_400, 6_400):
        levels._OPERATIONS_PER_BYTE = ratio
        sent = levels.offload_levels(model.spec.config, ids.numel(), 2).count("mlp")
        want = grads_of(plain, model, batch)
        grads_of(plain, model, batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        say(f"{sent} of 16 layers send attention, no graph: {timed(lambda: plain(model.adapter, model.base, model.spec, batch), 10)}; {gib()}")
        try:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            graphed = fastlora.value_and_grad(FL.loss, cuda_graph=True)
            for _ in range(3):
                found = grads_of(graphed, model, batch)
            same = all(map(torch.equal, found, want))
            say(f"{sent} of 16 layers send attention, graph:    {timed(lambda: graphed(model.adapter, model.base, model.spec, batch), 10)}; {gib()}; same bits {same}")
            again = all(map(torch.equal, grads_of(graphed, model, batch), want))
            say(f"     same bits after {14} replays: {again}")
            del graphed, found
        except Exception as error:
            say(f"graph failed: {type(error).__name__}: {error}; cause {error.__cause__!r}"[:900])
            traceback.print_exc(limit=-6)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    levels._OPERATIONS_PER_BYTE = 13_000
    tiny = {"input_ids": ids[:1, :64].contiguous(), "labels": ids[:1, :64].contiguous()}
    for recompute in ("offload", "none"):
        spec = model.with_spec(recompute=recompute).spec
        run = lambda: plain(model.adapter, model.base, spec, tiny)
        run(), run()
        torch.cuda.synchronize()
        say(f"1 x 64 tokens, {recompute}, no graph (the host's time): {timed(run, 6)}")


main()
