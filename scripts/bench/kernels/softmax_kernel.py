"""Error and time of the cross-entropy kernel, beside plain torch, Inductor and a copy.

python scripts/bench/kernels/softmax_kernel.py
"""

from functools import partial

import torch
from graph_timing import timed
from torch import Tensor

from fastlora.ops.loss import softmax_kernel
from fastlora.ops.loss.ignore import IGNORE

# (rows, vocabulary): the chunks of a step. The sets of inputs alternate so that the L2 cache holds
# none of them.
CHUNKS, SETS = ((1024, 128256), (4096, 32000), (512, 256000)), 4
VARIANTS = [(4096, 8), (8192, 16), (16384, 16), (16384, 32), (32768, 32)]  # (block, warps)


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
    return logits, labels


def errors() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n, v in ((512, 128256), (37, 32001), (5, 33)):
            logits, labels = drawn(dtype, n, v)
            labels[::7] = IGNORE
            exact = plain(logits.double(), labels)
            other = plain(logits, labels)
            mine = softmax_kernel.logprobs_and_dlogits_(logits.clone(), labels, IGNORE)
            error = lambda a, b: float((a.double() - b).norm() / b.norm())
            rows = [(error(m, e), error(o, e)) for m, o, e in zip(mine, other, exact, strict=True)]
            print(f"{dtype} {n} x {v}", *(f"kernel {a:.2e} plain {b:.2e}" for a, b in rows))


def row(what: object, us: float) -> None:
    print(f"  {what!s:<24} {us:7.1f} us", flush=True)


def times(n: int, v: int) -> None:
    print(f"{n} x {v}, bfloat16")
    sets = [drawn(torch.bfloat16, n, v, i) for i in range(SETS)]
    inductor = torch.compile(plain)
    row("Inductor", timed([partial(inductor, *s) for s in sets]))
    row("copy of the logits", timed([partial(torch.clone, logits) for logits, _ in sets]))
    rule = softmax_kernel.block_and_warps
    kernel = softmax_kernel.logprobs_and_dlogits_
    for variant in [rule(v), *VARIANTS]:
        softmax_kernel.block_and_warps = lambda v, variant=variant: variant
        row(variant, timed([partial(kernel, *s, IGNORE) for s in sets]))
    softmax_kernel.block_and_warps = rule
    for _, labels in sets:
        labels[::2] = IGNORE
    row("half of the rows ignored", timed([partial(kernel, *s, IGNORE) for s in sets]))


if __name__ == "__main__":
    print(torch.__version__, torch.cuda.get_device_name())
    errors()
    for chunk in CHUNKS:
        times(*chunk)
