"""Triton kernels of `step_inputs` and `take_tokens`.

The likeliest token is a maximum over keys of 64 bits: the logit as an integer of the same order
above, and the index, counted down, below. So the largest key has the largest logit, and of equal
logits the first. NaN has the largest integer. One kernel finds the largest key of each block of the
vocabulary, and a second one joins the blocks and updates the rows' state.

All kernels read and write after gdc_wait() only (PDL, see linear_kernel.py): the tensors that they
read are written by the kernels before them. They let the next kernel start at once, because they
are small, and the next one may read weights meanwhile.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false
import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.decode.token_rows import NO_TOKEN, TokenRows
from fastlora.ops.launch import launch, pdl_options

_COPIED = 1024  # elements of an embedding row for one program


# ── kernels (without helper functions, as in linear_kernel.py) ────────────────────────────
@triton.jit
def inputs_kernel(
    token_ptr, lengths_ptr, embedding_ptr, cos_ptr, sin_ptr, x_ptr, cos_out_ptr, sin_out_ptr,
    d, s, scale, SCALED: tl.constexpr, HD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A block of one row's embedding row. The first program also copies its angles."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, j = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.load(token_ptr + row).to(tl.int64)
    if block == 0:
        # A position behind the table would read foreign memory.
        position = tl.minimum(tl.load(lengths_ptr + row), s - 1).to(tl.int64)
        cos = tl.load(cos_ptr + position * HD + j, mask=j < HD, other=0.0)
        sin = tl.load(sin_ptr + position * HD + j, mask=j < HD, other=0.0)
        tl.store(cos_out_ptr + row * HD + j, cos, mask=j < HD)
        tl.store(sin_out_ptr + row * HD + j, sin, mask=j < HD)
    x = tl.load(embedding_ptr + token * d + i, mask=i < d, other=0.0)
    if SCALED:
        x = (x.to(tl.float32) * scale).to(x.dtype)
    tl.store(x_ptr + row * d + i, x, mask=i < d)


@triton.jit
def likeliest_kernel(
    logits_ptr, keys_ptr, sums_ptr, v,
    LOGPROBS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The largest key of one block of one row, and the sum of exp(logit - largest)."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = part * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # -inf behind the last logit loses against -inf at a smaller index.
    x = tl.load(logits_ptr + row * v + i, mask=i < v, other=-float("inf")).to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(x != x, 0x7FFFFFFF, order)
    key = tl.max((order.to(tl.int64) << 32) | (0x7FFFFFFF - i).to(tl.int64), 0)
    at = row * tl.num_programs(0) + part
    tl.store(keys_ptr + at, key)
    if LOGPROBS:
        order = (key >> 32).to(tl.int32)
        largest = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        # An infinite or NaN maximum is not subtracted: -inf - -inf is NaN.
        shift = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
        tl.store(sums_ptr + at, tl.sum(tl.exp(x - shift), 0))


@triton.jit
def take_kernel(  # noqa: PLR0915
    logits_ptr, keys_ptr, sums_ptr, candidates_ptr, token_ptr, lengths_ptr, made_ptr, limit_ptr,
    running_ptr, stop_ptr, report_ptr, cursor_ptr,
    v, parts, stops, report_step, report_row,
    NO_TOKEN: tl.constexpr, CANDIDATES: tl.constexpr, LOGPROBS: tl.constexpr, PARTS: tl.constexpr,
    STOPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Joins one row's blocks, and does what `take_tokens` says for it."""
    row = tl.program_id(0).to(tl.int64)
    j, n = tl.arange(0, PARTS), tl.arange(0, STOPS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    real = j < parts
    keys = tl.load(keys_ptr + row * parts + j, mask=real, other=-0x7FFFFFFFFFFFFFFF)
    running, old = tl.load(running_ptr + row), tl.load(token_ptr + row)
    length, cursor = tl.load(lengths_ptr + row), tl.load(cursor_ptr + row)
    made, limit = tl.load(made_ptr + row), tl.load(limit_ptr + row)
    ids = tl.load(stop_ptr + row * stops + n, mask=n < stops, other=NO_TOKEN)
    if LOGPROBS:
        sums = tl.load(sums_ptr + row * parts + j, mask=real, other=0.0)
    key = tl.max(keys, 0)
    order = (key >> 32).to(tl.int32)
    largest = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    if CANDIDATES:
        candidate = tl.load(candidates_ptr + row)
    else:
        candidate = 0x7FFFFFFF - (key & 0x7FFFFFFF)
    chosen = tl.where(running, candidate, old)
    entry = report_ptr + cursor * report_step + row
    tl.store(entry, tl.where(running, chosen, NO_TOKEN).to(tl.float64))
    tl.store(entry + report_row, largest.to(tl.float64))
    if LOGPROBS:
        logit = tl.load(logits_ptr + row * v + chosen).to(tl.float32)
        orders = (keys >> 32).to(tl.int32)
        each = (orders ^ ((orders >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        # The shifts that the blocks' sums were computed with, and one for the row.
        shifts = tl.where(tl.abs(each) < float("inf"), each, 0.0)
        shift = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
        # A block of -inf has the sum 0 and no shift, so exp(-shift) could be infinite.
        factor = tl.where(each == -float("inf"), 1.0, tl.exp(shifts - shift))
        total = tl.sum(tl.where(real, sums * factor, 0.0), 0)
        logprob = (logit - shift) - tl.log(total)
        tl.store(entry + 2 * report_row, logprob.to(tl.float64))
    new = running.to(tl.int64)
    made += new
    tl.store(token_ptr + row, chosen)
    tl.store(lengths_ptr + row, length + new)
    tl.store(made_ptr + row, made)
    tl.store(cursor_ptr + row, cursor + 1)
    no_stop = tl.max((ids == chosen).to(tl.int32), 0) == 0
    tl.store(running_ptr + row, running & (made < limit) & no_stop)


# ── launchers ─────────────────────────────────────────────────────────────────────────────
def launch_inputs(
    token: Int[Tensor, "b"],
    lengths: Int[Tensor, "b"],
    embedding: Float[Tensor, "v d"],
    cos: Float[Tensor, "s hd"],
    sin: Float[Tensor, "s hd"],
    pdl: bool | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b hd"], Float[Tensor, "b hd"]]:
    """`step_inputs` through the kernel, with its `scale`. `pdl`: None: if the GPU can."""
    b, d, (s, hd) = len(token), embedding.shape[1], cos.shape
    x, cos_out, sin_out = embedding.new_empty(b, d), cos.new_empty(b, hd), sin.new_empty(b, hd)
    block = min(_COPIED, triton.next_power_of_2(d))
    launch(
        inputs_kernel, (b, triton.cdiv(d, block)),
        token, lengths, embedding, cos, sin, x, cos_out, sin_out, d, s,
        1.0 if scale is None else scale, SCALED=scale is not None, HD=hd,
        WIDTH=triton.next_power_of_2(hd), BLOCK=block, num_warps=4, **pdl_options(x, pdl),
    )  # fmt: skip
    return x, cos_out, sin_out


def launch_tokens(
    logits: Float[Tensor, "b v"],
    rows: TokenRows,
    candidates: Int[Tensor, "b"] | None,
    logprobs: bool,
    pdl: bool | None = None,
) -> None:
    """`take_tokens` through the kernels. `pdl`: None: if the GPU can."""
    (b, v), stops, how = logits.shape, rows.stop.shape[1], pdl_options(logits, pdl)
    block, warps = (1024, 4) if b <= 4 else (4096, 8)  # of few rows all multiprocessors get a part
    parts = triton.cdiv(v, block)
    keys = torch.empty(b, parts, dtype=torch.int64, device=logits.device)
    sums = keys  # not read without log-probabilities
    if logprobs:
        sums = torch.empty(b, parts, dtype=torch.float32, device=logits.device)
    how |= dict(LOGPROBS=logprobs)
    given = logits, keys, sums, v
    launch(likeliest_kernel, (parts, b), *given, BLOCK=block, num_warps=warps, **how)
    report, tokens = rows.report, rows.token if candidates is None else candidates
    launch(
        take_kernel, (b,),
        logits, keys, sums, tokens, *rows, v, parts, stops, report.stride(0), report.stride(1),
        NO_TOKEN=NO_TOKEN, CANDIDATES=candidates is not None,
        PARTS=triton.next_power_of_2(parts), STOPS=triton.next_power_of_2(stops),
        num_warps=1 if parts <= 512 else 4, **how,
    )  # fmt: skip
