"""Attention with tensor descriptors (TMA) in place of pointers, plain causal rows of 4 x 2048.

    python probes/p6.py      (about 50 s on one H200)

The kernels are those of ops/attention/flash_kernel.py with three loads replaced. Microseconds a
call, from a CUDA graph of 6 calls. "same" compares results with those of the pointer kernels.
"""
import importlib.util, statistics, sys, tempfile, time
from pathlib import Path
T0 = time.perf_counter()
HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor
from fastlora.ops.attention import flash_kernel as flash
from fastlora.ops.dispatch import precision


def say(text):
    print(f"[{time.perf_counter() - T0:5.1f}] {text}", flush=True)


def with_descriptors():
    text = Path(flash.__file__).read_text()
    begin, one, two, rest = text.index("@triton.jit\ndef _forward"), text.index("@triton.jit\ndef _query"), text.index("@triton.jit\ndef _key_value"), text.index("# ── launchers")
    head, forward, queries, keys = text[:begin], text[begin:one], text[one:two], text[two:rest]
    at = "[(row * t + start).to(tl.int32), (head // GROUP) * D]"
    def swap(source, *pairs):
        for old, new in pairs:
            assert old in source, old
            source = source.replace(old, new)
        return source
    base = ("    k_at = k_ptr + row * t * k_token + (head // GROUP) * D\n    v_at = v_ptr + row * t * v_token + (head // GROUP) * D\n", "")
    forward = swap(forward, base, ("tl.load(k_at + key[None, :] * k_token + d[:, None])", f"tl.trans(k_ptr.load({at}))"), ("tl.load(v_at + key[:, None] * v_token + d[None, :])", f"v_ptr.load({at})"))
    queries = swap(queries, base, ("tl.load(k_at + key[:, None] * k_token + d[None, :])", f"k_ptr.load({at})"), ("tl.load(v_at + key[:, None] * v_token + d[None, :])", f"v_ptr.load({at})"))
    keys = swap(keys, ("        q_at = q_ptr + row * t * q_token + head * D\n        dout_at = dout_ptr + row * t * dout_token + head * D\n", ""),
                ("tl.load(q_at + query_t * q_token + d[None, :])", "q_ptr.load([(row * t + start).to(tl.int32), head * D])"),
                ("tl.load(dout_at + query_t * dout_token + d[None, :])", "dout_ptr.load([(row * t + start).to(tl.int32), head * D])"))
    path = Path(tempfile.mkdtemp()) / "flash_descriptors.py"
    path.write_text(head + forward + queries + keys)
    spec = importlib.util.spec_from_file_location("flash_descriptors", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["flash_descriptors"] = module
    spec.loader.exec_module(module)
    return module


def timed(fn, calls=6):
    try:
        fn(); torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                fn()
        graph.replay()
        times = []
        for _ in range(7):
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(); graph.replay(); b.record()
            torch.cuda.synchronize()
            times.append(1e3 * a.elapsed_time(b) / calls)
        return f"{statistics.median(times):7.1f} us"
    except Exception as error:
        return f"failed: {type(error).__name__} {str(error)[:160]}"


say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
tma = with_descriptors()
B, T, H, KV = 4, 2048, 32, 8
TILES = {
    128: {
        "forward": [(64, 64, 4, 3, None), (128, 64, 8, 3, None), (128, 128, 8, 2, None), (128, 64, 8, 2, None)],
        "queries": [(128, 32, 8, 3, 128), (128, 32, 8, 3, None), (64, 64, 4, 2, None), (128, 64, 8, 2, None)],
        "keys": [(32, 64, 4, 3, None), (64, 64, 4, 2, None), (64, 128, 8, 2, None), (64, 128, 8, 3, None), (32, 128, 8, 3, None)],
    },
    64: {
        "forward": [(64, 64, 4, 3, 128), (64, 64, 4, 3, None), (128, 64, 8, 3, 128), (128, 128, 8, 2, None)],
        "queries": [(64, 64, 4, 3, None), (64, 64, 4, 3, 128), (128, 64, 8, 3, 128)],
        "keys": [(32, 128, 4, 3, None), (64, 128, 8, 3, None), (64, 64, 4, 3, None), (64, 128, 4, 2, None)],
    },
}
for D in (128, 64):
    new = lambda n: torch.randn(B, T, n, D, device="cuda", dtype=torch.bfloat16)
    q, k, v, dout = new(H), new(KV), new(KV), new(H)
    by_head = [x.transpose(1, 2) for x in (q, k, v, dout)]
    if D == 128:
        say(f"{D}: cuDNN forward {timed(lambda: flash._by_cudnn(*by_head[:3], None))}")
    scale, angle = D**-0.5, torch.rand(T, D, device="cuda")
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    out, lse = torch.empty_like(q), torch.empty(B, H, T, device="cuda")
    delta, grads = torch.empty_like(lse), torch.empty(B, T, (H + 2 * KV) * D, device="cuda", dtype=torch.bfloat16)
    dq, dk, dv = grads.split([H * D, KV * D, KV * D], 2)
    static = dict(GROUP=H // KV, D=D, SPANS=False, CAPPED=False, EVEN=True, PRECISION=precision(torch.bfloat16))
    sizes = (T, H, scale, 1.0, H * D, KV * D, KV * D)
    def described(x, rows):
        return TensorDescriptor(x, [B * T, x.shape[2] * D], [x.shape[2] * D, 1], [rows, D])
    def options(tile):
        bm, bn, warps, stages, registers = tile
        return dict(BM=bm, BN=bn, STAGES=stages, num_warps=warps) | ({} if registers is None else dict(maxnreg=registers))
    def run(which, tile, new):
        bm, bn, *_ = tile
        m, how = (tma if new else flash), options(tile)
        if which == "forward":
            kk, vv = (described(k, bn), described(v, bn)) if new else (k, v)
            return lambda: m._forward_kernel[(B * H, T // bm)](q, kk, vv, q, out, lse, *sizes, **static, **how)
        if which == "queries":
            kk, vv = (described(k, bn), described(v, bn)) if new else (k, v)
            return lambda: m._query_gradient_kernel[(B * H, T // bm)](
                q, kk, vv, out, dout, lse, q, cos, sin, delta, dq, *sizes, H * D, H * D, grads.stride(1), 0, **static, ROPE=True, **how)
        qq, dd = (described(q, bm), described(dout, bm)) if new else (q, dout)
        return lambda: m._key_value_gradient_kernel[(B * KV, T // bn)](
            qq, k, v, dd, lse, delta, q, cos, sin, dk, dv, *sizes, H * D, grads.stride(1), 0, **static, ROPE=True, **how)
    for which in ("forward", "queries", "keys"):
        result = {"forward": out, "queries": dq, "keys": grads[:, :, H * D:]}[which]
        first = TILES[D][which][0]
        say(f"{D} {which:<8} pointers {first}: {timed(run(which, first, False))}")
        kept = result.float()
        for tile in TILES[D][which]:
            result.zero_()
            us = timed(run(which, tile, True))
            say(f"{D} {which:<8} descriptors {tile}: {us}; differs by {float((result.float() - kept).norm() / kept.norm()):.1e}")
        if which == "forward":
            run(which, first, False)()
