"""Error and time of the cross-entropy kernel, beside plain torch and Inductor.

python scripts/bench/kernels/softmax_kernel.py
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.ops.loss import softmax_kernel
from fastlora.ops.loss.ignore import IGNORE

# One chunk of a step. The sets of inputs alternate so that the L2 cache holds none of them.
N, V, SETS = 512, 128256, 8
VARIANTS = [(4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32), (32768, 32)]


def plain(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """chunk_value_and_grad without its two matrix products; Inductor compiles this."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logsoftmax = wide.log_softmax(-1)
    columns = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    onehot = (columns == labels[:, None].int()).to(wide.dtype)
    ignored = labels == IGNORE
    dlogits = torch.where(ignored[:, None], 0.0, onehot - logsoftmax.exp())
    chosen = logsoftmax.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(ignored, 0.0, chosen), dlogits.to(logits.dtype)


def drawn(dtype: torch.dtype, n: int, v: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator("cuda").manual_seed(seed)
    logits = (3 * torch.randn(n, v, device="cuda", generator=gen)).to(dtype)
    labels = torch.randint(v, (n,), device="cuda", generator=gen)
    labels[::7] = IGNORE
    return logits, labels


def errors() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n, v in ((N, V), (37, 32001), (5, 33)):
            logits, labels = drawn(dtype, n, v)
            exact = plain(logits.double(), labels)
            other = plain(logits, labels)
            mine = softmax_kernel.logprobs_and_dlogits_(logits.clone(), labels, IGNORE)
            error = lambda a, b: float((a.double() - b).norm() / b.norm())
            rows = [(error(m, e), error(o, e)) for m, o, e in zip(mine, other, exact, strict=True)]
            print(f"{dtype} {n} x {v}", *(f"kernel {a:.2e} plain {b:.2e}" for a, b in rows))


def timed(fn: Callable, sets: list) -> str:
    for s in sets[:3]:
        fn(*s)
    times = []
    for i in range(80):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn(*sets[i % len(sets)])
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return f"{statistics.median(times):.1f} us (quartiles {statistics.quantiles(times, n=4)})"


def times() -> None:
    sets = [drawn(torch.bfloat16, N, V, i) for i in range(SETS)]
    print("Inductor", timed(torch.compile(plain), sets), flush=True)
    copies = [(a, a.clone()) for a, _ in sets]
    print("copy of the logits", timed(lambda a, b: b.copy_(a), copies), flush=True)
    rule = softmax_kernel.block_and_warps
    for variant in [rule(V), *VARIANTS]:
        softmax_kernel.block_and_warps = lambda v, variant=variant: variant
        fn = lambda a, b: softmax_kernel.logprobs_and_dlogits_(a, b, IGNORE)
        print("block, warps", variant, timed(fn, sets), flush=True)


if __name__ == "__main__":
    print(torch.__version__, torch.cuda.get_device_name())
    errors()
    times()
