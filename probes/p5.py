"""Tiles: dropout's backward kernel with loads ahead, SwiGLU, the one-pass gradients.

    python probes/p5.py      (about 55 s on one H200)

Microseconds a call, from a CUDA graph of 12 calls over 3 sets of inputs.
"""
import statistics, sys, time
from pathlib import Path
T0 = time.perf_counter()
HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
import torch
from fastlora.ops.linear import low_rank_gradients_kernel as low
from fastlora.ops.linear import masked_lora_kernel as new
from fastlora.ops.swiglu import swiglu_kernel

N, R, CALLS, P = 8192, 16, 12, 0.05


def say(text):
    print(f"[{time.perf_counter() - T0:5.1f}] {text}", flush=True)


def drawn(*shape):
    return 0.05 * torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def timed(fn, sets):
    try:
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
        return f"{statistics.median(times):6.1f} us"
    except Exception as error:
        return f"failed: {type(error).__name__} {str(error)[:100]}"


say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
for shape, f in (("1B", 8192), ("8B", 14336)):
    forward = lambda g, u, x, y, b, c: swiglu_kernel.swiglu(g, u, x, y, b, c, None, 0.5, 0.5)
    sets = [(drawn(N, f), drawn(N, f), drawn(N, R), drawn(N, R), drawn(f, R), drawn(f, R)) for _ in range(2)]
    for tile in ((64, 64, 4), (32, 128, 4), (16, 256, 4), (32, 256, 8), (32, 64, 4), (16, 128, 4), (32, 128, 8), (16, 512, 8)):
        if shape == "1B" or tile in ((64, 64, 4), (32, 128, 4), (16, 256, 4)):
            swiglu_kernel._FORWARD = tile
            say(f"{shape} SwiGLU forward {tile}: {timed(forward, sets)}")
    backward = lambda h, k, a, g, u, x, y, b, c: swiglu_kernel.swiglu_backward_(h, k, a, g, u, x, y, b, c, None, 0.5, 0.5)
    sets = [(drawn(N, f), drawn(N, R), drawn(R, f), *s) for s in sets]
    for tile, chunks in (((32, 64, 4, 3), 8), ((32, 64, 4, 3), 4), ((16, 64, 4, 4), 8), ((16, 128, 4, 3), 8), ((32, 64, 4, 2), 8)):
        if shape == "1B" or chunks == 4 or tile == (32, 64, 4, 3):
            swiglu_kernel._BACKWARD, swiglu_kernel._CHUNKS = tile, chunks
            say(f"{shape} SwiGLU backward {tile} chunks {chunks}: {timed(backward, sets)}")
    del sets

for name, (d, k) in {"o": (2048, 1), "gate, up": (2048, 2), "q, k, v": (2048, 3), "down": (8192, 1)}.items():
    static = ([R] * k, [*range(k)], P)
    keys = torch.arange(k, device="cuda") + 12345
    sets = [(drawn(N, d), drawn(N, d), drawn(N, R * k), drawn(R * k, d)) for _ in range(3)]
    backward = lambda dx, x, g, a: new.masked_x_a_backward_(dx, x, g, a, keys, *static, True)
    for tile, chunks in (((32, 32, 4, 3), 32), ((32, 32, 4, 3), 16), ((32, 64, 4, 2), 32), ((32, 64, 4, 3), 32), ((32, 64, 4, 3), 16),
                         ((16, 64, 4, 3), 32), ((16, 64, 4, 4), 16), ((32, 64, 8, 3), 32)):
        new._BACKWARD, new._CHUNKS = tile, chunks
        say(f"{name:<9} masked backward {tile} {chunks}: {timed(backward, sets)}")
    forward = lambda dx, x, g, a: new.masked_x_a_fused(x, a, keys, *static)
    for tile in ((32, 4, 3), (32, 4, 4), (16, 4, 3), (16, 2, 3)):
        new._FORWARD = tile
        say(f"{name:<9} masked forward {tile}: {timed(forward, sets)}")
    del sets

for name, widths in (("1B o or down", (2048,)), ("1B q, k, v", (2048, 512, 512))):
    m, starts = sum(widths), [sum(widths[:i]) for i in range(len(widths))]
    sets = [(drawn(N, m), [drawn(w, R) for w in widths], drawn(N, R * len(widths))) for _ in range(3)]
    one = lambda dy, bs, x_a: low.low_rank_gradients_fused(dy, bs, x_a, starts, [0.5] * len(bs))
    for tile, programs in (((64, 256, 8, 3), 132), ((64, 128, 4, 3), 264), ((32, 256, 4, 4), 132), ((32, 128, 4, 4), 264), ((64, 256, 8, 4), 132), ((32, 512, 8, 3), 132)):
        low._TILE, low._PROGRAMS = tile, programs
        say(f"{name} one pass {tile} {programs}: {timed(one, sets)}")
