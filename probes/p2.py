"""Isolated products of a layer, the present way beside new ways: 8,192 tokens, bf16, r = 16.

    python probes/p2.py      (about 50 s on one H200)

Times are microseconds a call, from a CUDA graph of 12 calls over 3 sets of inputs. "bound" is bytes
at 4.0 TB/s or operations at 700 TFLOP/s. Errors are |x - exact| / |exact| against float64.
"""
import statistics, sys, time
from pathlib import Path
T0 = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from fastlora.ops.linear import low_rank_gradients_kernel as low
from fastlora.ops.swiglu import swiglu_kernel

N, R, SETS, CALLS = 8192, 16, 3, 12
B16 = torch.bfloat16


def say(text):
    print(f"[{time.perf_counter() - T0:5.1f}] {text}", flush=True)


def drawn(*shape, scale=0.05):
    return scale * torch.randn(*shape, device="cuda", dtype=B16)


def timed(fn, sets):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for s in sets:
            fn(*s)
    torch.cuda.current_stream().wait_stream(side)
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


def row(name, fn, make, bound, sets=SETS):
    try:
        us = timed(fn, [make() for _ in range(sets)])
        say(f"{name:<58} {us:7.1f} us   bound {bound:6.1f}")
    except Exception as e:
        say(f"{name:<58} failed: {type(e).__name__} {str(e)[:150]}")


def gb(*elements):
    return 2 * sum(elements) / 4.0e6


def fl(*mnk):
    return 2 * mnk[0] * mnk[1] * mnk[2] / 700e6


def sp(x, y, s=0.5):
    return torch.addmm(y[:1], x, y, beta=0, alpha=s)


def error(x, exact):
    return float((x.double() - exact).norm() / exact.norm())


def gradients(shape, d, kv):
    """b. dxA and dB, now two products a branch; new: one pass."""
    for name, widths in ((f"{shape} o or down", (d,)), (f"{shape} q, k, v", (d, kv, kv))):
        m = sum(widths)
        make = lambda: (drawn(N, m), [drawn(w, R) for w in widths], drawn(N, R * len(widths)))
        starts = [sum(widths[:i]) for i in range(len(widths))]

        def now(dy, bs, x_a):
            dys, cols = dy.split(widths, 1), x_a.split(R, 1)
            each = [sp(y, b) for y, b in zip(dys, bs)]
            dx_a = torch.cat(each, 1) if len(each) > 1 else each[0]
            return dx_a, [sp(y.t(), c) for y, c in zip(dys, cols)]

        new = lambda dy, bs, x_a: low.low_rank_gradients_fused(dy, bs, x_a, starts, [0.5] * len(bs))
        row(f"{name}: dxA and dB, now", now, make, gb(N * m))
        for tile, programs in (((64, 256, 8, 3), 264), ((64, 256, 8, 3), 132), ((64, 128, 4, 3), 396),
                               ((64, 128, 4, 3), 264), ((64, 256, 4, 3), 264), ((128, 128, 8, 3), 264)):
            if shape == "8B" and tile not in ((64, 256, 8, 3), (64, 128, 4, 3)):
                continue
            low._TILE, low._PROGRAMS = tile, programs
            row(f"{name}: one pass {tile} {programs}", new, make, gb(N * m))
        low._TILE, low._PROGRAMS = (64, 256, 8, 3), 264
        dy, bs, x_a = make()
        exact_a = torch.cat([0.5 * y.double() @ b.double() for y, b in zip(dy.split(widths, 1), bs)], 1)
        exact_b = [0.5 * y.double().t() @ c.double() for y, c in zip(dy.split(widths, 1), x_a.split(R, 1))]
        a0, b0 = now(dy, bs, x_a)
        a1, b1 = new(dy, bs, x_a)
        b1 = [g.view(-1, R) for g in b1.split([w * R for w in widths])]
        same = new(dy, bs, x_a)
        say(f"{name}: errors dxA now {error(a0, exact_a):.2e} new {error(a1, exact_a):.2e}; dB now "
            + " ".join(f"{error(x, e):.2e}" for x, e in zip(b0, exact_b)) + " new "
            + " ".join(f"{error(x, e):.2e}" for x, e in zip(b1, exact_b))
            + f"; same bits twice {torch.equal(a1, same[0])}")


def skinny(shape, d, f):
    """What the other skinny products take."""
    for r in (48, 16, 32):
        row(f"{shape} x A', {r} columns", lambda x, a: torch.mm(x, a.t()), lambda: (drawn(N, d), drawn(r, d)), gb(N * d))
        row(f"{shape} dA = dxA' x, {r} rows", lambda g, x: torch.mm(g.t(), x), lambda: (drawn(N, r), drawn(N, d)), gb(N * d))
    row(f"{shape} h A'", lambda x, a: torch.mm(x, a.t()), lambda: (drawn(N, f), drawn(R, f)), gb(N * f))
    row(f"{shape} dg B_g and du B_u", lambda g, u, b, c: (torch.mm(g, b) * 0.5, torch.mm(u, c) * 0.5),
        lambda: (drawn(N, f), drawn(N, f), drawn(f, R), drawn(f, R)), gb(2 * N * f), 2)
    row(f"{shape} dxA A, 48, written alone", lambda g, a: torch.mm(g, a), lambda: (drawn(N, 48), drawn(48, d)), gb(N * d))


def augmented(shape, d, f, kv):
    """a. base + low-rank: now two products; new: 64 more columns of K, or of N."""
    for name, m, k in ((f"{shape} q or o", d, d), (f"{shape} k or v", kv, d), (f"{shape} down", d, f)):
        def now(x, x_a, w, b):
            y = sp(x_a, b.t())
            return y.addmm_(x, w.t())
        row(f"{name} forward: now (low-rank, base adds)", now, lambda: (drawn(N, k), drawn(N, R), drawn(m, k), drawn(m, R)), fl(N, m, k), 2)
        row(f"{name} forward: base alone", lambda x, w: torch.mm(x, w.t()), lambda: (drawn(N, k), drawn(m, k)), fl(N, m, k), 2)
        row(f"{name} forward: K + 64", lambda x, w: torch.mm(x, w.t()), lambda: (drawn(N, k + 64), drawn(m, k + 64)), fl(N, m, k + 64), 2)
    for name, m, k in ((f"{shape} q, k, v", d + 2 * kv, d), (f"{shape} o", d, d), (f"{shape} gate + up", 2 * f, d)):
        parts = 2 if "gate" in name else 1
        def now(dys, g, a, ws):
            dx = torch.mm(g, a)
            for dy, w in zip(dys, ws):
                dx.addmm_(dy, w)
            return dx
        def alone(dys, ws):
            dx = torch.mm(dys[0], ws[0])
            for dy, w in zip(dys[1:], ws[1:]):
                dx.addmm_(dy, w)
            return dx
        w1 = m // parts
        row(f"{name} backward: now (dxA A, base adds)", now, lambda: ([drawn(N, w1) for _ in range(parts)], drawn(N, 48), drawn(48, k), [drawn(w1, k) for _ in range(parts)]), fl(N, k, m), 2)
        row(f"{name} backward: base alone", alone, lambda: ([drawn(N, w1) for _ in range(parts)], [drawn(w1, k) for _ in range(parts)]), fl(N, k, m), 2)
        row(f"{name} backward: K + 64", alone, lambda: ([drawn(N, w1 + (64 if i == 0 else 0)) for i in range(parts)], [drawn(w1 + (64 if i == 0 else 0), k) for i in range(parts)]), fl(N, k, m + 64), 2)
        row(f"{name} backward: N + 64", alone, lambda: ([drawn(N, w1) for _ in range(parts)], [drawn(w1, k + 64) for _ in range(parts)]), fl(N, k + 64, m), 2)
    row(f"{shape} down backward: base alone", lambda y, w: torch.mm(y, w), lambda: (drawn(N, d), drawn(d, f)), fl(N, d, f), 2)
    row(f"{shape} down backward: N + 64", lambda y, w: torch.mm(y, w), lambda: (drawn(N, d), drawn(d, f + 64)), fl(N, d, f + 64), 2)


def overlapped(shape, d, f):
    """Skinny products on a second stream while the base products of gate and up run."""
    side = torch.cuda.Stream()
    def base(dg, du, wg, wu):
        dx = torch.mm(dg, wg)
        return dx.addmm_(du, wu)
    def now(dg, du, wg, wu, bg, bu, a):
        g = torch.cat((sp(dg, bg), sp(du, bu)), 1)
        dx = torch.mm(g, a)
        return dx.addmm_(dg, wg).addmm_(du, wu)
    def overlap(dg, du, wg, wu, bg, bu, a):
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            g = torch.cat((sp(dg, bg), sp(du, bu)), 1)
        dx = base(dg, du, wg, wu)
        here.wait_stream(side)
        return dx.addmm_(g, a)
    full = lambda: (drawn(N, f), drawn(N, f), drawn(f, d), drawn(f, d), drawn(f, R), drawn(f, R), drawn(2 * R, d))
    row(f"{shape} gate, up backward with dxA: now", now, full, fl(N, f, 2 * d), 2)
    row(f"{shape} gate, up backward with dxA: on a second stream", overlap, full, fl(N, f, 2 * d), 2)


def swiglu(shape, f):
    forward = lambda g, u, x, y, b, c: swiglu_kernel.swiglu(g, u, x, y, b, c, None, 0.5, 0.5)
    backward = lambda h, k, a, g, u, x, y, b, c: swiglu_kernel.swiglu_backward_(h, k, a, g, u, x, y, b, c, None, 0.5, 0.5)
    f_in = lambda: (drawn(N, f), drawn(N, f), drawn(N, R), drawn(N, R), drawn(f, R), drawn(f, R))
    b_in = lambda: (drawn(N, f), drawn(N, R), drawn(R, f), *f_in())
    for tile in ((64, 64, 4), (32, 128, 4), (64, 128, 8), (128, 64, 8)):
        swiglu_kernel._FORWARD = tile
        row(f"{shape} SwiGLU forward {tile}", forward, f_in, gb(3 * N * f), 2)
    for tile, chunks in (((32, 64, 4, 3), 8), ((32, 64, 4, 3), 16), ((32, 128, 8, 3), 8), ((64, 64, 8, 3), 8), ((32, 64, 4, 4), 8), ((32, 128, 4, 3), 8)):
        swiglu_kernel._BACKWARD, swiglu_kernel._CHUNKS = tile, chunks
        row(f"{shape} SwiGLU backward {tile} chunks {chunks}", backward, b_in, gb(5 * N * f), 2)


say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
x = drawn(2**28)
y = torch.empty_like(x)
row("copy of 512 MiB, both ways 1 GiB", lambda: y.copy_(x), lambda: (), 2**30 / 4.0e6, 1)
del x, y
for shape, d, f, kv in (("1B", 2048, 8192, 512), ("8B", 4096, 14336, 1024)):
    gradients(shape, d, kv)
    skinny(shape, d, f)
    overlapped(shape, d, f)
    augmented(shape, d, f, kv)
    if shape == "1B":
        swiglu(shape, f)
