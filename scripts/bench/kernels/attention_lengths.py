"""Time causal attention by row length: fastlora's kernels beside cuDNN's.

    python scripts/bench/kernels/attention_lengths.py

Forward and backward passes of 8,192 tokens (of one row if the row is longer), bf16, each replayed
from a CUDA graph. fastlora's backward pass includes RoPE's gradient; cuDNN's does not.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastlora.ops.attention.flash import make_spans
from fastlora.ops.attention.flash_kernel import flash_backward, flash_forward

HEADS, KV_HEADS, TOKENS = 32, 8, 8192
aten = torch.ops.aten


def timed(fn: Callable[[], object], times: int) -> float:
    """Microseconds per call: the median of 5 replays of a graph with `times` calls."""
    fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            fn()
    graph.replay()
    found = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / times)
    return statistics.median(found)


def drawn(b: int, t: int, hd: int) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    gen = torch.Generator("cuda").manual_seed(0)
    new = partial(torch.randn, generator=gen, device="cuda", dtype=torch.bfloat16)
    return [new(b, t, n, hd).transpose(1, 2) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    print(f"{'head_dim':>8}{'tokens':>8}{'ours':>14}{'cuDNN':>20}{'documents of 512':>20}   us")
    for hd in (64, 128):
        for t in (512, 1024, 2048, 4096, 8192, 16384, 32768):
            b = max(1, TOKENS // t)
            times = max(1, 16384 // t)
            q, k, v, dy = drawn(b, t, hd)
            table = torch.rand(1, t, hd, device="cuda", dtype=torch.bfloat16)
            index = torch.arange(t, device="cuda").expand(b, t)
            columns = []
            for where in (None, make_spans(index // 512 * 512)):
                first, last = where or (None, None)
                out, lse = flash_forward(q, k, v, first)
                given = (dy, q, k, v, out, lse, first, last, table, table)
                forward = timed(lambda q=q, k=k, v=v, f=first: flash_forward(q, k, v, f), times)
                columns.append((forward, timed(lambda g=given: flash_backward(*g), times)))
            run = lambda q=q, k=k, v=v: aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, True
            )
            out, lse, *rest = run()
            cum_q, cum_k, max_q, max_k, seed, offset, _ = rest
            given = (dy, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0)
            back = lambda a=given: aten._scaled_dot_product_cudnn_attention_backward(*a, True)
            columns.insert(1, (timed(run, times), timed(back, times)))
            cells = "".join(f"{f:>12.0f}{g:>8.0f}" for f, g in columns)
            print(f"{hd:>8}{t:>8}{cells}", flush=True)


if __name__ == "__main__":
    main()
