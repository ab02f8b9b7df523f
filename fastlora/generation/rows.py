"""The state of all rows on the device, and the step that gives each running row one more token.

A step reads and writes only these tensors, the cache and the model, so that a CUDA graph of it can
be replayed any number of times. The host reads `report` after several steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from fastlora.generation.angles import RopeTables
from fastlora.generation.cache import Cache
from fastlora.generation.forward import decode
from fastlora.generation.kernel_layer import StepKernels
from fastlora.generation.prepare import PreparedModel
from fastlora.generation.sampling import (
    RowSampling,
    Sampling,
    Variant,
    choose,
    likeliest_tokens,
    row_sampling,
    row_values,
)
from fastlora.ops.decode.next_token import take_tokens
from fastlora.ops.decode.token_rows import NO_TOKEN, TokenRows

REPORTED_STEPS = 16  # steps between two synchronisations of host and device
MOST_ALTERNATIVES = 20


class Rows(NamedTuple):
    """One entry for each slot. A free slot has an entry too, which is not running."""

    token: Int[Tensor, "slots"]  # the newest token, whose keys and values are not cached yet
    lengths: Int[Tensor, "slots"]  # tokens in the cache
    made: Int[Tensor, "slots"]  # new tokens so far
    limit: Int[Tensor, "slots"]  # new tokens at most
    running: Bool[Tensor, "slots"]
    adapter_ids: Int[Tensor, "slots"]
    stop: Int[Tensor, "slots n"]  # stop ids, and NO_TOKEN in unused places
    sampling: RowSampling
    seen: Bool[Tensor, "slots v"] | None  # ids of prompt and new tokens, if a row has a penalty
    report: Float64[Tensor, "steps 3 slots"]  # see ops/decode/token_rows.py
    cursor: Int[Tensor, "slots"]  # the entry of `report` that the next step writes
    # As `report`: the results of `likeliest_tokens`, if a row asks for them.
    likeliest: Float64[Tensor, "steps 2 k slots"] | None = None


def new_rows(slots: int, stop_ids: int, device: torch.device) -> Rows:
    """Free slots with room for `stop_ids` stop ids each."""
    zeros = lambda: torch.zeros(slots, dtype=torch.int64, device=device)
    return Rows(
        *(zeros() for _ in range(4)),
        running=torch.zeros(slots, dtype=torch.bool, device=device),
        adapter_ids=zeros(),
        stop=torch.full((slots, stop_ids), NO_TOKEN, device=device),
        sampling=row_sampling(slots, device),
        seen=None,
        report=torch.zeros(REPORTED_STEPS, 3, slots, dtype=torch.float64, device=device),
        cursor=zeros(),
    )


class NewRow(NamedTuple):
    """The values with which a row begins."""

    slot: int
    prompt: list[int]
    limit: int
    adapter_id: int
    stop: tuple[int, ...]
    sampling: Sampling
    seed: int


def begin(rows: Rows, new: Sequence[NewRow], vocab_size: int) -> None:
    """Write the entries of new rows. The cache holds their prompts without the last token.

    Two copies to the device, one of whole numbers and one of others.
    """
    width, device = rows.stop.shape[1], rows.token.device
    whole, others = [], []
    for row in new:
        temperature, top_k, rest, min_p, penalty, seed = row_values(
            row.sampling, row.seed, vocab_size
        )
        stop = [*row.stop, *[NO_TOKEN] * (width - len(row.stop))]
        length = len(row.prompt) - 1
        begin = [row.slot, row.prompt[-1], length, row.limit, row.adapter_id, top_k, seed]
        whole.append([*begin, *stop])
        others.append([temperature, rest, min_p, penalty])
    slots, token, lengths, limit, adapter_ids, top_k, seed, *stop = (
        torch.tensor(whole, device="cpu").to(device).unbind(1)
    )
    temperature, rest, min_p, penalty = (
        torch.tensor(others, dtype=torch.float32, device="cpu").to(device).unbind(1)
    )
    values = {"token": token, "lengths": lengths, "limit": limit, "adapter_ids": adapter_ids}
    for name, value in values.items():
        getattr(rows, name)[slots] = value
    rows.made[slots], rows.running[slots] = 0, True
    rows.stop[slots] = torch.stack(stop, 1)
    settings = RowSampling(temperature, top_k, rest, min_p, penalty, seed)
    for name, value in settings._asdict().items():
        getattr(rows.sampling, name)[slots] = value


def step(
    model: PreparedModel,
    cache: Cache,
    rows: Rows,
    b: int,
    end: int,
    variant: Variant,
    table: RopeTables,
    kernels: StepKernels,
) -> None:
    """One more token for each running row of slots 0 to b - 1.

    Rows that do not run go through the model too: they write the same index of their slot again.

    Args:
        model: of `prepare`.
        cache: of all slots.
        rows: updated in place.
        b: no slot from b on is running.
        end: no row has more than `end` tokens after the step.
        variant: what the running rows need.
        table: see `decode`.
        kernels: see `decode`.
    """
    used = lambda x: x if b == len(x) else x[:b]  # a view costs 2 us on the CPU
    token, lengths, made, limit, running, adapter_ids, stop = map(used, rows[:7])
    logits = decode(model, cache, token, lengths, adapter_ids, table, kernels, end)
    seen = None if rows.seen is None else used(rows.seen)
    candidates = None  # the likeliest tokens, which take_tokens finds
    if variant.draws or variant.penalty:
        settings = RowSampling(*map(used, rows.sampling))
        candidates = choose(logits, seen, settings, made, variant)
    if variant.alternatives and rows.likeliest is not None:
        found = likeliest_tokens(logits, rows.likeliest.shape[2])
        rows.likeliest[..., :b].index_copy_(0, rows.cursor[:1], found[None])
    own = TokenRows(
        token, lengths, made, limit, running, stop, rows.report[..., :b], used(rows.cursor)
    )
    which = "triton" if kernels.triton else "torch"
    take_tokens(logits, own, candidates, logprobs=variant.logprobs, kernels=which)
    if variant.penalty and seen is not None:
        seen.scatter_(1, token[:, None], True)
