"""Triton kernel of `rotated_qkv`: reads the base products of q, k and v side by side, adds their
low-rank terms, rotates q and k, and writes each to a tensor of its own."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import precision, rank_tile


# HEADS are the numbers of heads of q and of k, RANKS the ranks of q, k and v; 0: no low-rank term.
# A program takes TOGETHER heads of one of the three, so that it reads the tables once for them. It
# uses no helper functions; swiglu_kernel.py says why.
@triton.jit
def _rotated_qkv_kernel(
    y_ptr, x_a_ptr, b_q_ptr, b_k_ptr, b_v_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr,
    n, t, x_a_row, table_row, s_q, s_k, s_v,
    HEADS: tl.constexpr, RANKS: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    TOGETHER: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) * TOGETHER
    begin, heads, rank, of_x_a = 0, HEADS[0], RANKS[0], 0
    b_ptr, out_ptr, scaling = b_q_ptr, q_ptr, s_q
    if head >= HEADS[0]:
        begin, heads, rank, of_x_a = HEADS[0], HEADS[1], RANKS[1], RANKS[0]
        b_ptr, out_ptr, scaling = b_k_ptr, k_ptr, s_k
    if head >= HEADS[0] + HEADS[1]:
        begin, rank, of_x_a = HEADS[0] + HEADS[1], RANKS[2], RANKS[0] + RANKS[1]
        b_ptr, out_ptr, scaling = b_v_ptr, v_ptr, s_v
    rotated = head < HEADS[0] + HEADS[1]
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    here = (token < n)[:, None]
    half, r = tl.arange(0, D // 2), tl.arange(0, R)[None, :]
    far = token.to(tl.int64)[:, None]
    table = (token // t).to(tl.int64) * table_row + token % t * D
    table = table[:, None] + half[None, :]
    of_tables = (token < tl.where(rotated, n, 0))[:, None]  # v needs no table
    cos_1 = tl.load(cos_ptr + table, mask=of_tables, other=0.0)
    cos_2 = tl.load(cos_ptr + table + D // 2, mask=of_tables, other=0.0)
    sin_1 = tl.load(sin_ptr + table, mask=of_tables, other=0.0)
    sin_2 = tl.load(sin_ptr + table + D // 2, mask=of_tables, other=0.0)
    x_a = tl.load(x_a_ptr + far * x_a_row + of_x_a + r, mask=here & (r < rank), other=0.0)
    y_at = y_ptr + far * ((HEADS[0] + 2 * HEADS[1]) * D) + head * D + half[None, :]
    out_at = out_ptr + far * (heads * D) + (head - begin) * D + half[None, :]
    b_at = b_ptr + ((head - begin) * D + half[:, None]) * rank + r
    for i in tl.static_range(TOGETHER):  # pyright: ignore
        one = tl.load(y_at + i * D, mask=here, other=0.0).to(tl.float32)
        two = tl.load(y_at + i * D + D // 2, mask=here, other=0.0).to(tl.float32)
        b_1 = tl.load(b_at + i * D * rank, mask=r < rank, other=0.0)
        b_2 = tl.load(b_at + (i * D + D // 2) * rank, mask=r < rank, other=0.0)
        one += scaling * tl.dot(x_a, tl.trans(b_1), input_precision=PRECISION)
        two += scaling * tl.dot(x_a, tl.trans(b_2), input_precision=PRECISION)
        first = tl.where(rotated, one * cos_1 - two * sin_1, one)
        second = tl.where(rotated, two * cos_2 + one * sin_2, two)
        kind = out_ptr.dtype.element_ty
        tl.store(out_at + i * D, first.to(kind), mask=here)
        tl.store(out_at + i * D + D // 2, second.to(kind), mask=here)


# Tokens in a tile, and the most heads of a program.
_TOKENS, _TOGETHER, _WARPS = 64, 4, 8


def rotated_qkv(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "d_out d"],
    x_a: Float[Tensor, "n r"],
    bs: list[Float[Tensor, "_ _"] | None],
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
    heads: list[int],
    scalings: list[float],
) -> tuple[Float[Tensor, "n q"], Float[Tensor, "n k"], Float[Tensor, "n k"]]:
    """(q, k, v) of `rotated_qkv`, as the rows of all heads of a token.

    Args:
        x: the input, row after row.
        weight: those of q, k and v as one matrix.
        x_a: x times the As of those that have a B, side by side.
        bs: the Bs of q, k and v, or None.
        cos: RoPE's table.
        sin: the other one.
        heads: the numbers of heads of q and of k.
        scalings: of the three low-rank terms.
    """
    (h, kv), n, (rows, t, hd) = heads, x.shape[0], cos.shape
    y = torch.mm(x, weight.t())
    q, k, v = (x.new_empty(n, size * hd) for size in (h, kv, kv))
    ranks = tuple(0 if b is None else b.shape[1] for b in bs)
    # The kernel reads nothing of a term that is absent; y takes the place of its B.
    given = [y if b is None else b.contiguous() for b in bs]
    together = next(size for size in (_TOGETHER, 2, 1) if h % size == 0 and kv % size == 0)
    tables = (cos.contiguous(), sin.contiguous())
    sizes = (n, t, x_a.stride(0), t * hd if rows > 1 else 0)
    static = dict(HEADS=(h, kv), RANKS=ranks, R=rank_tile(*ranks), D=hd, TOGETHER=together)
    static |= dict(BM=_TOKENS, PRECISION=precision(x.dtype), num_warps=_WARPS)
    _rotated_qkv_kernel[(triton.cdiv(n, _TOKENS), (h + 2 * kv) // together)](
        *(y, x_a, *given, *tables, q, k, v),
        *sizes,
        *scalings,
        **static,  # pyright: ignore
    )
    return q, k, v
