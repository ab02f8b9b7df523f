"""ContextPart: what a rank needs to know of whole rows when it runs its own pieces of them.

All ranks of a context group get the same batch of whole rows. Each runs the layers on its own
tokens, with their positions in the row, and the masks and noise that they have on one rank.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.arguments import describe
from fastlora.models.config import LlamaConfig
from fastlora.models.neftune import with_noise
from fastlora.models.positions import first_seen, positions, segment_starts, sequence_lengths
from fastlora.models.rope_tables import tables_by_type
from fastlora.models.stacks import stack_size
from fastlora.ops.attention.context_group import ContextGroup, own_tokens
from fastlora.ops.attention.flash import kernel_supports
from fastlora.ops.attention.part_attention import PartSpans, make_part_spans, part_mask
from fastlora.ops.dispatch import transforms_active
from fastlora.ops.loss.ignore import IGNORE
from fastlora.runtime.per_example import PerExample


class ContextPart(NamedTuple):
    """This rank's part of a batch of rows of s tokens: two pieces of each row, t tokens in all."""

    group: ContextGroup
    input_ids: Int[Tensor, "b t"]
    following: Int[Tensor, "b t"]  # the label of each token's successor, or IGNORE
    position_ids: Int[Tensor, "#b t"]
    lengths: Int[Tensor, "b #t"]  # of each token's sequence
    own: Int[Tensor, "t"]  # numbers of the tokens in the row
    documents: Int[Tensor, "b s"] | None  # ids whose runs are documents; None: a row is one
    # Of each piece of each row, the number of its first token in the batch, as masks count.
    first_rows: Int[Tensor, "p"]

    @property
    def tokens(self) -> int:
        """s, the length of a row."""
        return self.group.ranks * len(self.own)


def context_part(
    inputs: Mapping[str, Tensor | None],
    labels: Int[Tensor, "b s"],
    group: ContextGroup,
    first_row: Int[Tensor, ""] | None,
) -> ContextPart:
    """This rank's part of a batch. Rows are padded to a multiple of 2 * group.ranks tokens.

    Args:
        inputs: input_ids and, if they are given, attention_mask, position_ids and segment_ids.
        labels: of the rows; the first token of a document has none.
        group: the ranks that have the rows.
        first_row: the number of the batch's first token in a larger batch; None: 0.
    """
    ids, mask, segments = (inputs.get(k) for k in ("input_ids", "attention_mask", "segment_ids"))
    assert ids is not None
    (b, t), device = ids.shape, ids.device
    place = inputs.get("position_ids")
    place = positions(ids, mask, segments) if place is None else place
    lengths = sequence_lengths(place, segments)
    documents = _documents(mask, segments)
    more = -t % (2 * group.ranks)
    own = own_tokens(t + more, group, device)
    cut = lambda x, fill=0: F.pad(x, (0, more), value=fill)[:, own]
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    rows = torch.arange(b, device=device)[:, None] * t + own.view(2, -1)[:, 0]
    return ContextPart(
        group,
        cut(ids),
        cut(following, IGNORE),
        cut(place),
        lengths if lengths.shape[1] == 1 else cut(lengths, 1),
        own,
        None if documents is None else F.pad(documents, (0, more), value=-1),
        rows.flatten() if first_row is None else rows.flatten() + first_row,
    )


def context_problems(
    adapter: Any, context: Any, adapter_ids: Any, add: Any, inputs_embeds: Any
) -> list[str]:
    """The arguments that a call with `context` does not support, by name."""
    if not isinstance(context, ContextGroup):
        return [f"context={describe(context)}: expected the result of fastlora.context_group"]
    stacked = not isinstance(adapter, PerExample) and stack_size(adapter) is not None
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    found = {
        "per_example: gradients of examples need whole rows": isinstance(adapter, PerExample),
        "adapter is a stack: run its adapters one after the other": stacked,
        "adapter_ids: there is one adapter": adapter_ids is not None,
        "add: tensors are added to whole rows only": add is not None,
        "inputs_embeds: rows are cut by their input_ids": inputs_embeds is not None,
        "torch.func: its transforms do not reach other ranks": transforms_active(),
        "cuda_graph=True: the ranks' transfers are not recorded": capturing,
        "your own torch.compile: layers are compiled already": torch.compiler.is_compiling(),
    }
    return [problem for problem, is_so in found.items() if is_so]


def padding_problems(
    mask: Int[Tensor, "b s"] | None,
    segments: Int[Tensor, "b s"] | None,
    labels: Int[Tensor, "b s"],
) -> list[str]:
    """Padding that is read, or predicts a trained label: its query's keys are not one span.

    Reads from the device if there is a mask.
    """
    if mask is None:
        return []
    real, t = mask.bool(), mask.shape[1]
    begins = real & ~F.pad(real[:, :-1], (1, 0))
    if segments is not None:
        begins |= real & segment_starts(segments)
    # Runs of real tokens up to each token, less those before its document.
    runs = begins.cumsum(1)
    first = first_seen(t, None, segments, mask.device).expand_as(runs)
    before = (runs - begins.long()).gather(1, first)
    runs, following = runs - before, F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    found = {
        "attention_mask is 0 between real tokens: padding must be at the ends of a document": (
            real & (runs > 1)
        ),
        "labels after padding are trained: they must be -100 there": (
            ~real & (runs > 0) & (following != IGNORE)
        ),
    }
    return [problem for problem, where in found.items() if bool(where.any())]


def _documents(
    mask: Int[Tensor, "b s"] | None, segments: Int[Tensor, "b s"] | None
) -> Int[Tensor, "b s"] | None:
    """Ids whose runs are documents; each token of padding, left or right, is one by itself."""
    if segments is not None:
        segments = segments - segments.amin()
    if mask is None:
        return segments
    padding = -2 - torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask.bool(), 0 if segments is None else segments, padding)


def part_tables(
    part: ContextPart,
    config: LlamaConfig,
    windows: Mapping[str, int | None],
    dtype: torch.dtype,
    fused: bool,
) -> tuple[dict[str, tuple[Float[Tensor, "b t hd"], Float[Tensor, "b t hd"]]], dict[str, Any]]:
    """(layer type -> RoPE's cos and sin, layer type -> the keys that this rank's queries see).

    The keys are PartSpans if the kernels run, else masks [#b, 1, t, s].

    Args:
        part: of the rows.
        config: of the model.
        windows: layer type -> how many keys a query sees; None: no limit.
        dtype: of the hidden states.
        fused: whether Triton kernels run.
    """
    tables = tables_by_type(config, part.position_ids, part.lengths, dtype)
    return tables, _masks(part, config, windows, dtype, fused)


def _masks(
    part: ContextPart,
    config: LlamaConfig,
    windows: Mapping[str, int | None],
    dtype: torch.dtype,
    fused: bool,
) -> dict[str, Bool[Tensor, "#b 1 t s"] | PartSpans]:
    b, s, hd = len(part.input_ids), part.tokens, config.head_dim
    sizes = ((config.num_attention_heads, len(part.own)), (config.num_key_value_heads, s))
    kernels = fused and all(kernel_supports(dtype, heads, hd, n) for heads, n in sizes)
    masks: dict[str, Any] = {}
    for layer_type, window in windows.items():
        first = first_seen(s, window, part.documents, part.own.device)[:, part.own]
        until = part.own.expand_as(first)
        if kernels:
            masks[layer_type] = make_part_spans(first.expand(b, -1), until.expand(b, -1), s)
        else:
            masks[layer_type] = part_mask(first, until, s)
    return masks


def part_noise(
    x: Float[Tensor, "b t d"], part: ContextPart, alpha: float, seed: Int[Tensor, ""]
) -> Float[Tensor, "b t d"]:
    """x with the noise of NEFTune that these tokens have on one rank."""
    b, t, d = x.shape
    pieces = x.reshape(2 * b, t // 2, d)
    lengths = part.lengths.expand(b, t).reshape(2 * b, t // 2)
    seeds = seed.expand(2 * b)
    return with_noise(pieces, alpha, seeds, lengths, part.first_rows).view(b, t, d)
