"""Each kernel against fp64, over the error of plain torch."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.ops.attention.attention import attention_reference
from fastlora.ops.attention.flash import flash_attention, make_spans
from fastlora.ops.attention.rope import apply_rope
from fastlora.ops.decode.norm import norm_rows
from fastlora.ops.dropout import keep_mask
from fastlora.ops.linear.experts import grouped_lora_linear, grouped_lora_linear_reference
from fastlora.ops.linear.low_rank_gradients import (
    low_rank_gradients,
    low_rank_gradients_reference,
)
from fastlora.ops.linear.masked_lora import Masks, Segments, masked_x_a_reference
from fastlora.ops.loss.linear_cross_entropy import (
    chunk_value_and_grad,
    chunk_value_and_grad_kernel,
)
from fastlora.ops.swiglu.swiglu import lora_swiglu, lora_swiglu_reference
from oracles.gpu_models import Row, relative

pytestmark = [pytest.mark.gpu, pytest.mark.part("kernels")]


def grouped() -> Iterator[Row]:
    """The grouped kernel and the loop, against fp64: aligned, unaligned, empty groups."""
    sizes = [300, 0, 17, 1, 0, 707, 8, 0]
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32).cuda()
    gen = torch.Generator().manual_seed(0)
    for d_in, d_out, r in ((256, 512, 16), (256, 512, 5), (250, 512, 16), (256, 510, 8)):
        shapes = ((sum(sizes), d_in), (8, d_out, d_in), (8, r, d_in), (8, d_out, r))
        wide = [torch.randn(s, generator=gen, dtype=torch.float64).cuda() for s in shapes]
        dy = torch.randn(sum(sizes), d_out, generator=gen, dtype=torch.float64).cuda()

        def run(dtype: torch.dtype, fn: Callable, wide: list = wide, dy: Tensor = dy) -> list:
            x, w, a, b = (t.to(dtype) for t in wide)
            leaves = [t.requires_grad_() for t in (x, a, b)]
            y = fn(x, w, a, b, ends, 0.5)
            return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

        exact = run(torch.float64, grouped_lora_linear_reference)
        plain = run(torch.bfloat16, grouped_lora_linear_reference)
        for name, fn in (
            ("eager", grouped_lora_linear),
            ("compiled", torch.compile(_fullgraph, fullgraph=True)),
        ):
            ours = run(torch.bfloat16, fn)
            ratio = max(
                relative(o, e) / relative(p, e) for o, p, e in zip(ours, plain, exact, strict=True)
            )
            yield f"grouped {d_in} x {d_out}, r {r}, {name}, bf16", ratio, 1.2
            yield (
                f"grouped {d_in} x {d_out}, r {r}, {name}, fp32",
                relative(run(torch.float32, fn), exact),
                1e-5,
            )


def _fullgraph(*args: Any) -> Any:
    return grouped_lora_linear(*args)


def swiglu() -> Iterator[Row]:
    """The fused SwiGLU's results and gradients, against fp64, over plain torch's error."""
    gen = torch.Generator().manual_seed(0)
    sizes = ((1000, 704, (8, 8, 8)), (2048, 1024, (16, 16, 16)), (77, 130, (3, 40, 20)))
    cases = [*product(sizes, (False, True), (False,)), (sizes[1], False, True)]
    for (n, f, ranks), gained, gelu in cases:
        (r_g, r_u, r_a), label = ranks, ", DoRA" if gained else ", GeGLU" if gelu else ""
        shapes = ((n, f), (n, f), (n, r_g), (n, r_u), (f, r_g), (f, r_u), (r_a, f), (2, f))
        wide = [torch.randn(s, generator=gen, dtype=torch.float64).cuda() for s in shapes]
        wide = [x if i < 4 else 0.3 * x for i, x in enumerate(wide)]
        given = [
            torch.randn(s, generator=gen, dtype=torch.float64).cuda() for s in ((n, f), (n, r_a))
        ]

        def run(
            dtype: torch.dtype,
            fn: Callable,
            wide: list = wide,
            given: list = given,
            gained: bool = gained,
            gelu: bool = gelu,
        ) -> list[Tensor]:
            leaves = [x.to(dtype).requires_grad_() for x in wide[:-1]]
            gains = wide[-1].to(torch.promote_types(dtype, torch.float32)).requires_grad_()
            results = fn(*leaves, gains if gained else None, 0.7, 1.9, gelu=gelu)
            leaves += [gains] if gained else []
            grads = torch.autograd.grad(results, leaves, [d.to(dtype) for d in given])
            return [*(x.detach() for x in results), *grads]

        exact = run(torch.float64, lora_swiglu_reference)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            plain, fused = run(dtype, lora_swiglu_reference), run(dtype, lora_swiglu)
            if dtype == torch.float32:  # tl.sigmoid's exponential is the fast one
                law = f"swiglu {n} x {f}, ranks {ranks}, {dtype}{label}"
                yield law, relative(fused, exact), 1e-6
                continue
            errors = zip(fused, plain, exact, strict=True)
            ratio = max(relative(x, e) / relative(p, e) for x, p, e in errors)
            yield f"swiglu {n} x {f}, ranks {ranks}, {dtype}{label}", ratio, 1.2


def dropped() -> Iterator[Row]:
    """Low-rank products under masks, and their gradients, against fp64, over plain torch's error;
    and how many elements a kernel keeps otherwise than keep_mask."""
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).cuda()
    sizes = (
        (1000, 704, (8, 8, 8)),
        (8192, 2048, (16, 16, 16)),
        (77, 130, (3, 40)),
        (300, 96, (64,)),
    )
    for n, d, ranks in sizes:
        wide = [new(n, d), *(0.3 * new(r, d) for r in ranks)]
        dlow, dx, law = new(n, sum(ranks)), new(n, d), f"masked_x_a {n} x {d}, ranks {ranks}"
        keys = (2**31 + torch.arange(len(ranks))).cuda()
        # The second sees all of x, as start factors do.
        masks = Masks(keys, (0, -1, 2)[: len(ranks)], 0.1, True)

        def plain(dtype: torch.dtype, wide: list, dlow: Tensor, dx: Tensor, masks: Masks) -> list:
            leaves = [t.to(dtype).requires_grad_() for t in wide]
            low = masked_x_a_reference(leaves[0], leaves[1:], masks)
            more, *da = torch.autograd.grad(low, leaves, dlow.to(dtype))
            return [low.detach(), dx.to(dtype) + more, torch.cat(da)]

        def fused(dtype: torch.dtype, wide: list, dlow: Tensor, dx: Tensor, masks: Masks) -> list:
            x, *matrices = (t.to(dtype) for t in wide)
            a, ops, grown = torch.cat(matrices), torch.ops.fastlora, dx.to(dtype, copy=True)
            keys, ranks = masks.keys, tuple(m.shape[0] for m in matrices)
            segments = Segments(ranks, masks.slots, masks.p)
            low = ops.masked_x_a(x, a, keys, *segments)
            da = ops.masked_x_a_backward_(grown, x, dlow.to(dtype), a, keys, *segments, True)
            return [low, grown, da]

        given = (wide, dlow, dx, masks)
        exact = plain(torch.float64, *given)
        for dtype in (torch.bfloat16, torch.float16):
            errors = zip(fused(dtype, *given), plain(dtype, *given), exact, strict=True)
            ratio = max(relative(x, e) / relative(p, e) for x, p, e in errors)
            yield f"{law}, {dtype}", ratio, 1.2
        # cuBLAS cuts long sums into more pieces than the kernel: 1.5 to 2.5 times less error.
        yield f"{law}, float32", relative(fused(torch.float32, *given), exact), 1e-6
        zeros, ones = torch.zeros(n, d).cuda(), torch.ones(n, d).cuda()
        given = ([ones, ones[:1]], torch.ones(n, 1).cuda(), zeros, Masks(keys, (0,), 0.5, True))
        low, found, _ = fused(torch.float32, *given)
        keep = keep_mask(keys[0], n, d, 0.5, found.device)
        wrong = (found != 2.0 * keep).sum() + (low[:, 0] != 2.0 * keep.sum(1)).sum()
        yield f"{law}: elements and rows of another mask", float(wrong), 0


def low_rank() -> Iterator[Row]:
    """dxA and dB in one pass over dy, against fp64, over plain torch's error; equal bits twice."""
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).cuda()
    sizes = (
        (8192, (2048, 512, 512), (16, 16, 16)),
        (8192, (4096,), (16,)),
        (1001, (130, 700), (3, 16)),
        (5, (7, 300, 64), (1, 8, 4)),
        (1, (300, 64), (8, 4)),
    )
    for n, widths, ranks in sizes:
        wide = [new(n, sum(widths) + 8), new(n, sum(ranks))]
        bs = [new(w, r) for w, r in zip(widths, ranks, strict=True)]
        starts = [8 + sum(widths[:i]) for i in range(len(widths))]
        law = f"low_rank_gradients {n} x {widths}, ranks {ranks}"

        def run(
            fn: Callable,
            dtype: torch.dtype,
            wide: list = wide,
            bs: list = bs,
            starts: list = starts,
        ) -> list[Tensor]:
            dy, x_a, *of = (t.to(dtype) for t in [*wide, *bs])
            dx_a, dbs = fn(dy, of, x_a, starts, [0.5, 2.0, 1.5][: len(of)])
            return [dx_a, *dbs]

        exact = run(low_rank_gradients_reference, torch.float64)
        for dtype in (torch.bfloat16, torch.float16):
            plain, fused = (
                run(f, dtype) for f in (low_rank_gradients_reference, low_rank_gradients)
            )
            errors = zip(fused, plain, exact, strict=True)
            ratio = max(relative(x, e) / relative(p, e) for x, p, e in errors)
            yield f"{law}, {dtype}", ratio, 1.2
            again = run(low_rank_gradients, dtype)
            different = sum(int((x != y).sum()) for x, y in zip(fused, again, strict=True))
            yield f"{law}, {dtype}: elements that differ in a second run", different, 0


def flash() -> Iterator[Row]:
    """Attention and its gradients, rotation included, against fp64, over plain torch's error.

    Scores have a cap in rows with 2 query heads for each key head.
    """
    gen = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 2, 512, 64), (1, 4, 4, 700, 64), (2, 8, 2, 512, 128), (1, 4, 1, 333, 128))
    shapes += ((1, 4, 2, 700, 128), (2, 4, 2, 512, 256), (1, 4, 2, 333, 256), (1, 4, 1, 700, 256))
    for (b, h, kv, t, hd), case in product(shapes, ("causal", "documents", "window")):
        scale, cap = (0.2, 4.0) if h == 2 * kv else (None, None)
        wide = [
            torch.randn(b, t, n, hd, generator=gen, dtype=torch.float64).cuda().transpose(1, 2)
            for n in (h, kv, kv, h)
        ]
        angles = 6 * torch.rand(1, t, hd // 2, generator=gen, dtype=torch.float64).cuda()
        angles, index = angles.repeat(1, 1, 2), torch.arange(t, device="cuda").expand(b, t)
        first = index // 150 * 150 if case == "documents" else (index - 99).clamp(min=0)
        where = None if case == "causal" else make_spans(first)
        mask = (index[:, None] <= index[..., None]) & (index[:, None] >= first[..., None])
        mask = None if case == "causal" else mask[:, None]

        def plain(q, k, v, rope, mask=mask, how=(scale, cap)) -> Tensor:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
            return attention_reference(q, k, v, mask, *how)

        def fused(q, k, v, rope, where=where, how=(scale, cap)) -> Tensor:
            return flash_attention(q, k, v, rope, where, None, *how)

        def run(dtype: torch.dtype, fn: Callable, wide=wide, angles=angles) -> list[Tensor]:
            leaves = [x.to(dtype).requires_grad_() for x in wide[:3]]
            result = fn(*leaves, (angles.cos().to(dtype), angles.sin().to(dtype)))
            return [result.detach(), *torch.autograd.grad(result, leaves, wide[3].to(dtype))]

        exact = run(torch.float64, plain)
        for dtype in (torch.bfloat16, torch.float16):
            errors = zip(run(dtype, fused), run(dtype, plain), exact, strict=True)
            ratio = max(relative(x, e) / relative(p, e) for x, p, e in errors)
            label = f"{case}{', capped' if cap else ''}, {dtype}"
            yield f"flash {b} x {h} ({kv}) x {t} x {hd}, {label}", ratio, 1.2


def loss() -> Iterator[Row]:
    """Log-probabilities of labels and their gradients, against fp64, over plain torch's error."""
    gen = torch.Generator().manual_seed(0)
    for (n, v), cap in product(((300, 40001), (64, 128256)), (None, 5.0)):
        h, weight = (
            torch.randn(s, generator=gen, dtype=torch.float64).cuda() for s in ((n, 64), (v, 64))
        )
        labels = torch.randint(v, (n,), generator=gen).cuda()
        labels[::3] = -100
        exact = chunk_value_and_grad(h, weight, labels, cap)
        for dtype in (torch.bfloat16, torch.float32):
            given = h.to(dtype), weight.to(dtype), labels, cap
            found, plain = chunk_value_and_grad_kernel(*given), chunk_value_and_grad(*given)
            errors = zip(found, plain, exact, strict=True)
            ratio = max(relative(x, e) / relative(p, e) for x, p, e in errors)
            yield f"loss of {n} x {v} logits, {dtype}, cap {cap}", ratio, 1.5
        wrong = sum(int(x[::3].count_nonzero()) for x in found)
        yield f"loss of {n} x {v} logits, cap {cap}: ignored values off", float(wrong), 0


def norms() -> Iterator[Row]:
    """Norms of a decode step's rows, against fp64, over plain torch's error."""
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).cuda()
    for (n, d), kind in product(((3, 2304), (64, 256)), ("narrow", "wide", "one_plus")):
        x, weight, residual = new(n, d).bfloat16(), new(d).bfloat16(), new(n, d).bfloat16()
        exact = norm_rows(x.double(), weight.double(), 1e-6, kind, residual.double())
        found, plain = (
            norm_rows(x, weight, 1e-6, kind, residual, kernels=k) for k in ("triton", "torch")
        )
        yield (
            f"norm of rows {n} x {d}, {kind}",
            relative(found, exact) / relative(plain, exact),
            1.2,
        )


@pytest.mark.parametrize(
    "rows",
    [grouped, swiglu, dropped, low_rank, flash, loss, norms],
    ids=lambda rows: rows.__name__,
)
def test_kernel_errs_no_more_than_plain_torch(rows, check):
    check(rows())
