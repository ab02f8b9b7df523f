"""Keys and values of a row whose tokens are on several ranks, gathered to all of them
(Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.3.2, arXiv:2407.21783).

A row of 2 N pieces is on N ranks: rank r has the pieces r and 2 N - 1 - r, so that causal attention
takes the same time on all of them.

The derivative sums each rank's part of the gradient in float32, in the order of ranks, and rounds
once: the same bits in every run. It sends the bytes of a reduce-scatter.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ContextGroup:
    """The ranks that have one row together, as one of them sees them. Hashable.

    `fastlora.context_group` makes it.
    """

    name: str
    """Of the process group, as torch.distributed knows it."""
    rank: int
    """In [0, ranks)."""
    ranks: int


def own_tokens(tokens: int, group: ContextGroup, device: torch.device) -> Tensor:
    """The numbers of this rank's tokens in a row, increasing, [tokens / ranks].

    `tokens` is a multiple of 2 * ranks.
    """
    pieces = torch.arange(tokens, device=device).view(2 * group.ranks, -1)
    return torch.cat((pieces[group.rank], pieces[2 * group.ranks - 1 - group.rank]))


def tokens_of_ranks(
    x: Float[Tensor, "p b s w"], ranks: int
) -> Float[Tensor, "{ranks} p b 2 s//(2*{ranks}) w"]:
    """For each rank the two pieces of its tokens. s is a multiple of 2 * ranks.

    With a list of indices the host would wait for the GPU.
    """
    pieces = x.unflatten(2, (2 * ranks, -1))
    of = lambda r: torch.stack((pieces[:, :, r], pieces[:, :, 2 * ranks - 1 - r]), 2)
    return torch.stack([of(r) for r in range(ranks)])


# ── ops ───────────────────────────────────────────────────────────────────────────────────
# The tensors are [p, b, tokens, w]: p is 2, for keys and values, and w is of all heads. Ops that
# nothing looks into, because torch's compiler may then neither split nor reorder them.
torch.library.define("fastlora::gather_tokens", "(Tensor x, int ranks, str group) -> Tensor")
torch.library.define("fastlora::scatter_tokens", "(Tensor x, int ranks, str group) -> Tensor")


@torch.library.impl("fastlora::gather_tokens", "CompositeExplicitAutograd")
def _gather_tokens(x: Tensor, ranks: int, group: str) -> Tensor:
    p, b, t, w = x.shape
    every = x.new_empty(ranks, p, b, 2, t // 2, w)
    gather = getattr(_c10d(), "all_gather_single", None) or _c10d().all_gather_into_tensor
    gather(every.view(-1), x.contiguous().view(-1), group=_resolved(group))
    whole = x.new_empty(p, b, 2 * ranks, t // 2, w)
    for r in range(ranks):
        for half, piece in enumerate((r, 2 * ranks - 1 - r)):
            whole[:, :, piece].copy_(every[r, :, :, half])
    return whole.view(p, b, ranks * t, w)


@torch.library.impl("fastlora::scatter_tokens", "CompositeExplicitAutograd")
def _scatter_tokens(x: Tensor, ranks: int, group: str) -> Tensor:
    p, b, s, w = x.shape
    parts = torch.empty_like(sent := tokens_of_ranks(x, ranks))
    _c10d().all_to_all_single(parts.view(-1), sent.view(-1), group=_resolved(group))
    total = parts[0].to(torch.promote_types(x.dtype, torch.float32))
    for part in parts[1:]:
        total = total + part
    return total.to(x.dtype).view(p, b, s // ranks, w)


@torch.library.register_fake("fastlora::gather_tokens")
def _(x, ranks, group):
    p, b, t, w = x.shape
    return x.new_empty(p, b, t * ranks, w)


@torch.library.register_fake("fastlora::scatter_tokens")
def _(x, ranks, group):
    p, b, s, w = x.shape
    return x.new_empty(p, b, s // ranks, w)


def _c10d() -> Any:
    """torch.distributed, whose functions torch 2.13 has renamed."""
    return torch.distributed


def _resolved(group: str) -> Any:
    return torch.distributed.distributed_c10d._resolve_process_group(group)  # pyright: ignore


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, group):
        ctx.ranks, ctx.group = ranks, group
        return torch.ops.fastlora.gather_tokens(x, ranks, group)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.ops.fastlora.scatter_tokens(dy, ctx.ranks, ctx.group), None, None


def gather_keys_values(
    k: Float[Tensor, "b kv t hd"], v: Float[Tensor, "b kv t hd"], group: ContextGroup
) -> tuple[Float[Tensor, "b kv s hd"], Float[Tensor, "b kv s hd"]]:
    """The keys and values of all tokens of the rows, in their order, from those of each rank.

    Every rank of the group must call it. The results are views of one tensor.
    """
    kv = k.shape[1]
    own = torch.stack([x.transpose(1, 2).flatten(2) for x in (k, v)])
    whole: Any = _Gathered.apply(own, group.ranks, group.name)
    heads = whole.unflatten(3, (kv, -1)).transpose(2, 3)
    return heads[0], heads[1]
