"""Low-rank products under dropout: one hash for an element (old) and for two (new), 1B shapes.

    python probes/p3.py      (about 45 s on one H200)

Microseconds a call, from a CUDA graph of 12 calls over 3 sets of inputs.
"""
import statistics, sys, time
from pathlib import Path
T0 = time.perf_counter()
HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
import torch
import old_masked as old
from fastlora.ops.dropout import keep_mask
from fastlora.ops.linear import masked_lora_kernel as new

N, R, SETS, CALLS, P = 8192, 16, 3, 12, 0.05
INPUTS = {"q, k, v": (2048, 3), "gate, up": (2048, 2), "o": (2048, 1), "down": (8192, 1)}


def say(text):
    print(f"[{time.perf_counter() - T0:5.1f}] {text}", flush=True)


def drawn(*shape):
    return 0.05 * torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def timed(fn, sets):
    for s in sets:
        fn(*s)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            fn(*sets[i % len(sets)])
    graph.replay()
    times = []
    for _ in range(9):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); graph.replay(); b.record()
        torch.cuda.synchronize()
        times.append(1e3 * a.elapsed_time(b) / CALLS)
    return statistics.median(times)


say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
for name, (d, k) in INPUTS.items():
    static = ([R] * k, [*range(k)], P)
    keys = torch.arange(k, device="cuda") + 12345
    make = lambda: (drawn(N, d), drawn(N, d), drawn(N, R * k), drawn(R * k, d))
    sets = [make() for _ in range(SETS)]
    forward = lambda m: lambda dx, x, g, a: m.masked_x_a_fused(x, a, keys, *static)
    backward = lambda m: lambda dx, x, g, a: m.masked_x_a_backward_(dx, x, g, a, keys, *static, True)
    say(f"{name:<9} forward  old: {timed(forward(old), sets):6.1f}")
    for tile in ((64, 4), (64, 8), (32, 4), (128, 8)):
        new._FORWARD = tile
        say(f"{name:<9} forward  new {tile}: {timed(forward(new), sets):6.1f}")
    say(f"{name:<9} backward old: {timed(backward(old), sets):6.1f}")
    for tile, chunks in (((32, 32, 4), 32), ((32, 32, 4), 16), ((32, 64, 8), 32), ((32, 64, 4), 32), ((64, 32, 8), 32)):
        new._BACKWARD, new._CHUNKS = tile, chunks
        say(f"{name:<9} backward new {tile} {chunks}: {timed(backward(new), sets):6.1f}")
    new._FORWARD, new._BACKWARD, new._CHUNKS = (64, 4), (32, 32, 4), 32
    dx, x, g, a = make()
    x_a = new.masked_x_a_fused(x, a, keys, *static)
    before = dx.clone()
    da = new.masked_x_a_backward_(dx, x, g, a, keys, *static, True)
    want_dx, worst = before.double(), [0.0, 0.0]
    for i in range(k):
        keep = keep_mask(keys[i], N, d, P, x.device)
        seen = torch.where(keep, x.double() / (1 - P), 0.0)
        part = slice(R * i, R * i + R)
        error = lambda found, want: float((found.double() - want).norm() / want.norm())
        worst[0] = max(worst[0], error(x_a[:, part], seen @ a[part].double().t()))
        worst[1] = max(worst[1], error(da[part], g[:, part].double().t() @ seen))
        want_dx += torch.where(keep, g[:, part].double() @ a[part].double() / (1 - P), 0.0)
    say(f"{name:<9} errors of the new: x_a {worst[0]:.2e}, dA {worst[1]:.2e}, dx {error(dx, want_dx):.2e}")
