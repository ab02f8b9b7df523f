"""The two ends of a decode step: the inputs of the first layer, and the next token of every row.

In plain torch they are some 25 small operations, 0.15 ms of a step of 1.08 (1B, one row, H200). In
next_token_kernel.py they are three kernels. The references below are the specification.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.decode.token_rows import NO_TOKEN, TokenRows
from fastlora.ops.dispatch import Kernels, use_kernel

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class StepInputs(NamedTuple):
    """The inputs of the first layer of a step."""

    x: Float[Tensor, "b d"]
    cos: Float[Tensor, "b hd"]
    sin: Float[Tensor, "b hd"]


# ── 1. references ─────────────────────────────────────────────────────────────────────────
def step_inputs_reference(
    token: Int[Tensor, "b"],
    lengths: Int[Tensor, "b"],
    embedding: Float[Tensor, "v d"],
    cos: Float[Tensor, "s hd"],
    sin: Float[Tensor, "s hd"],
    scale: float | None = None,
) -> StepInputs:
    """The specification of `step_inputs`."""
    x = F.embedding(token, embedding)
    return StepInputs(x if scale is None else x * scale, cos[lengths], sin[lengths])


def chosen_logprobs(logits: Float[Tensor, "b v"], token: Int[Tensor, "b"]) -> Float[Tensor, "b"]:
    """Log-probabilities of the chosen tokens under the model's own logits, in at least float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(-1, token[:, None])[:, 0] - wide.logsumexp(-1)


def take_tokens_reference(
    logits: Float[Tensor, "b v"],
    rows: TokenRows,
    candidates: Int[Tensor, "b"] | None,
    logprobs: bool,
) -> None:
    """The specification of `take_tokens`."""
    token, lengths, made, limit, running, stop, report, cursor = rows
    if candidates is None:
        candidates = logits.argmax(-1)
    chosen = torch.where(running, candidates, token)
    entries = [torch.where(running, chosen, NO_TOKEN), logits.amax(-1)]
    if logprobs:
        entries.append(chosen_logprobs(logits, chosen))
    entry = torch.stack([x.double() for x in entries])[None]
    report[:, : len(entries)].index_copy_(0, cursor[:1], entry)
    cursor.add_(1)
    token.copy_(chosen)
    lengths.add_(running)
    made.add_(running)
    stopped = (chosen[:, None] == stop).any(-1)
    running.logical_and_(~stopped & (made < limit))


# ── 2. public functions ───────────────────────────────────────────────────────────────────
@torch.no_grad()
def step_inputs(
    token: Int[Tensor, "b"],
    lengths: Int[Tensor, "b"],
    embedding: Float[Tensor, "v d"],
    cos: Float[Tensor, "s hd"],
    sin: Float[Tensor, "s hd"],
    scale: float | None = None,
    *,
    kernels: Kernels = "auto",
) -> StepInputs:
    """Each row's row of the embedding, and the cosines and sines of its position.

    Args:
        token: the newest token of each row, in [0, v).
        lengths: each row's position, in [0, s).
        embedding: in any dtype.
        cos: cosines of positions 0, 1, ...
        sin: sines of positions 0, 1, ...
        scale: factor of the embedding, a number in its dtype; None: 1.
        kernels: "auto", "triton" or "torch", as in ops/dispatch.py. Tensors that are not contiguous
            take the reference.
    """
    adjacent = all(x.is_contiguous() for x in (token, lengths, embedding, cos, sin))
    if not (use_kernel(embedding, kernels) and adjacent):
        return step_inputs_reference(token, lengths, embedding, cos, sin, scale)
    from fastlora.ops.decode.next_token_kernel import launch_inputs  # noqa: PLC0415  imports triton

    return StepInputs(*launch_inputs(token, lengths, embedding, cos, sin, scale=scale))


@torch.no_grad()
def take_tokens(
    logits: Float[Tensor, "b v"],
    rows: TokenRows,
    candidates: Int[Tensor, "b"] | None = None,
    *,
    logprobs: bool = False,
    kernels: Kernels = "auto",
) -> None:
    """Give each running row its next token, write the report's entry, and end rows that are done.

    A row ends with a token of `stop` or with its `limit`-th new token. A row that does not run
    keeps its state, and NO_TOKEN is reported for it.

    Args:
        logits: the model's, in any dtype.
        rows: updated in place.
        candidates: the next tokens; None: the likeliest ones as torch.argmax chooses, which takes
            the first of equal logits and counts NaN as the largest.
        logprobs: whether the log-probabilities of the tokens under `logits` are reported. They are
            computed in float32, or in float64 from such logits.
        kernels: "auto", "triton" or "torch", as in ops/dispatch.py. Logits in another dtype than
            bf16, fp16 or fp32 and tensors that are not contiguous take the reference.
    """
    adjacent = all(x.is_contiguous() for x in (logits, *rows[:6], rows.cursor))
    known = logits.dtype in _DTYPES and adjacent and rows.report.stride(2) == 1
    if not (use_kernel(logits, kernels) and known):
        take_tokens_reference(logits, rows, candidates, logprobs)
        return
    from fastlora.ops.decode.next_token_kernel import launch_tokens  # noqa: PLC0415  imports triton

    launch_tokens(logits, rows, candidates, logprobs)
