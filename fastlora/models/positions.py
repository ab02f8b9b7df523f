"""Positions of tokens, and which tokens each may attend to."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor


def positions(
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    segment_ids: Int[Tensor, "b t"] | None,
) -> Int[Tensor, "#b t"]:
    """Default positions: they restart with each segment, or count the real tokens of a row."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if segment_ids is not None:
        return index - _document_starts(segment_ids)
    if attention_mask is not None:
        # Padding before the first real token would get -1.
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return index


def segment_starts(segment_ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """True at the first token of each run of equal segment ids."""
    first = torch.ones_like(segment_ids[:, :1], dtype=torch.bool)
    return torch.cat((first, segment_ids[:, 1:] != segment_ids[:, :-1]), dim=1)


def _document_starts(segment_ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """For each token the index of its document's first token. Every run of an id is a document."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    # The running maximum carries each start forward to the tokens after it.
    return torch.where(segment_starts(segment_ids), index, 0).cummax(-1).values


def first_seen(
    t: int, window: int | None, segment_ids: Int[Tensor, "b t"] | None, device: torch.device
) -> Int[Tensor, "#b t"]:
    """For each query the index of the first key that it attends to; the last key is its own."""
    index = torch.arange(t, device=device)[None]
    first = torch.zeros_like(index) if segment_ids is None else _document_starts(segment_ids)
    return first if window is None else torch.maximum(first, index - window + 1)


def attention_mask_2d(
    t: int,
    window: int | None,
    attention_mask: Int[Tensor, "b t"] | None,
    segment_ids: Int[Tensor, "b t"] | None,
    device: torch.device,
) -> Bool[Tensor, "#b 1 t t"] | None:
    """True where query i attends to key j; None if attention is only causal.

    Every token, padding too, attends to itself, so that no softmax row is empty.

    Args:
        t: tokens in a row.
        window: how many keys a query sees, its own included; None: no limit.
        attention_mask: 1 = real token.
        segment_ids: packed documents.
        device: of the result.
    """
    if (window is None or window >= t) and attention_mask is None and segment_ids is None:
        return None
    i = torch.arange(t, device=device)
    first = first_seen(t, window, segment_ids, device)
    # first is [b, t] by query; its new last dimension is broadcast over the keys.
    allowed = (i[:, None] >= i) & (i >= first[..., None])
    if attention_mask is not None:
        allowed = allowed & (attention_mask[:, None, :].bool() | (i[:, None] == i))
    return allowed[:, None]


def sequence_lengths(
    position_ids: Int[Tensor, "b t"], segment_ids: Int[Tensor, "b t"] | None
) -> Int[Tensor, "b #t"]:
    """The length of each token's sequence: its row, or its document if rows are packed."""
    if segment_ids is None:
        return position_ids.amax(-1, keepdim=True) + 1
    t = segment_ids.shape[1]
    index = torch.arange(t, device=segment_ids.device)
    is_last = F.pad(segment_starts(segment_ids)[:, 1:], (0, 1), value=True)
    # Index of the last token of each token's document: a running minimum from the right.
    last = torch.where(is_last, index, t - 1).flip(-1).cummin(-1).values.flip(-1)
    return position_ids.expand_as(segment_ids).gather(1, last) + 1
