"""Time attention over packed documents: SDPA with a boolean mask, and flex_attention.

    python scripts/bench/kernels/packed_attention.py

Forward and backward of one layer, bf16. Rows of 2,048 tokens hold four documents of 512.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from launch_timing import timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

SHAPES = {"1b 4 x 2048": (4, 32, 8, 2048, 64), "8b 4 x 2048": (4, 32, 8, 2048, 128)}
DOCUMENT = 512


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def in_document(segments: Tensor) -> Callable[..., Tensor]:
    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (segments[b, i] == segments[b, j])

    return seen


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def both_ways(fn: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: list[Tensor], dy: Tensor):
    def run() -> list[Tensor]:
        return list(torch.autograd.grad(fn(*qkv), qkv, dy))

    return run


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    flex = torch.compile(flex_attention)
    for name, (b, h, kv, t, hd) in SHAPES.items():
        made = [torch.randn(b, n, t, hd, device="cuda", dtype=torch.bfloat16) for n in (h, kv, kv)]
        qkv = [x.requires_grad_() for x in made]
        dy = torch.randn_like(made[0])
        segments = (torch.arange(t, device="cuda") // DOCUMENT).expand(b, t).contiguous()
        mask = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
        runs: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            "causal, SDPA": lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ),
            "documents, SDPA with a mask": partial(masked, mask=mask),
        }
        blocks = {
            "causal": create_block_mask(causal, None, None, t, t, device="cuda"),
            "documents": create_block_mask(in_document(segments), b, None, t, t, device="cuda"),
        }
        for kind, lists in blocks.items():
            runs[f"{kind}, flex"] = lambda q, k, v, lists=lists: flex(
                q, k, v, block_mask=lists, enable_gqa=True
            )
        exact = both_ways(
            partial(masked, mask=mask),
            [x.detach().double().requires_grad_() for x in made],
            dy.double(),
        )
        with sdpa_kernel(SDPBackend.MATH):
            truth = exact()
        for kind, fn in runs.items():
            run = both_ways(fn, qkv, dy)
            first, again = run(), run()
            same = all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
            off = max(float((x - y).norm() / y.norm()) for x, y in zip(first, truth, strict=True))
            error = f"{off:.1e}" if kind.startswith("documents") else "-"
            print(
                f"{name}  {kind:<30}{timed(run, [()]):>30}  same bits {same}  error {error}",
                flush=True,
            )


if __name__ == "__main__":
    main()
