"""part_attention: queries of some pieces of a row over all of its keys.

Values and gradients err no more than plain torch under the same mask, relative to float64. Without
a GPU the kernels run in Triton's interpreter, in fp32 and fp16.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.models.positions import first_seen
from fastlora.ops.attention.attention import attention_reference
from fastlora.ops.attention.context_group import ContextGroup, own_tokens, tokens_of_ranks
from fastlora.ops.attention.part_attention import (
    make_part_spans,
    part_attention,
    part_mask,
)

pytest.importorskip("triton", reason="the kernels' tests need triton: requirements-test.txt has it")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CPU = torch.device("cpu")


def documents(t: int, *lengths: int) -> torch.Tensor:
    lengths = (*lengths, t - sum(lengths))
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def keys_of(t: int, group: ContextGroup, case: str, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, last key) of each of a rank's queries."""
    window = 20 if case == "window" else None
    ids = torch.stack([documents(t, t // 3, t // 2), documents(t, t // 7)])[:b]
    own = own_tokens(t, group, CPU)
    first = first_seen(t, window, ids if case == "documents" else None, CPU).expand(b, t)[:, own]
    return first.contiguous(), own.expand_as(first)


def value_and_grads(fn, leaves, dy, seen):
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = fn(*leaves, seen)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("case", ["causal", "documents", "window"])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (2, 3)])
def test_spans_equal_the_mask_by_query_and_by_key(case, rank, ranks):
    t = 60
    first, until = keys_of(t, ContextGroup("", rank, ranks), case, 2)
    mask = part_mask(first, until, t)[:, 0]
    spans = make_part_spans(first, until, t)
    i = torch.arange(t // ranks)
    by_key = (i >= spans.since[..., None]) & (i <= spans.last[..., None])
    assert by_key.equal(mask.mT)
    whole = torch.ones(t, t, dtype=torch.bool).tril()
    if case == "causal":
        assert mask[0].equal(whole[own_tokens(t, ContextGroup("", rank, ranks), CPU)])
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in spans)


class Called(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_tokens_of_ranks_are_found_without_an_index_tensor():
    """An index tensor would be copied to the GPU, for which the host waits, in every layer."""
    ranks, s = 3, 24
    x = torch.randn(2, 2, s, 5, generator=torch.Generator().manual_seed(0))
    with Called() as called:
        found = tokens_of_ranks(x, ranks)
    own = [x[:, :, own_tokens(s, ContextGroup("", r, ranks), CPU)] for r in range(ranks)]
    assert found.flatten(3, 4).equal(torch.stack(own))
    assert "aten.stack.default" in called.names and "aten.index.Tensor" not in called.names


# (b, query heads, key heads, tokens of the row, head size), rank, ranks. Pieces shorter than a
# tile, so that a tile has queries of both; pieces of whole tiles; keys that no query sees.
SHAPES = [
    ((2, 4, 2, 40, 16), 0, 2),
    ((2, 2, 1, 256, 16), 1, 2),
    ((1, 2, 1, 264, 64), 2, 3),
    ((1, 2, 2, 200, 128), 0, 2),
    ((1, 2, 1, 80, 256), 1, 2),
]

PLAIN = (None, None)
CAPPED = (0.3, 2.0)  # scale and cap: most scores are far above the cap

CASES = [
    (SHAPES[0], "documents", PLAIN, torch.float32),
    (SHAPES[0], "window", PLAIN, torch.float16),
    (SHAPES[0], "documents", CAPPED, torch.float16),
    (SHAPES[0], "causal", (0.3, None), torch.float32),
    (SHAPES[1], "causal", PLAIN, torch.float32),
    (SHAPES[1], "window", CAPPED, torch.float32),
    (SHAPES[2], "documents", PLAIN, torch.float16),
    (SHAPES[2], "causal", PLAIN, torch.float32),
    (SHAPES[3], "window", PLAIN, torch.float32),
    (SHAPES[4], "window", CAPPED, torch.float32),
]
if CUDA:
    CASES += [
        (x, case, how, torch.bfloat16)
        for x in SHAPES
        for case in ("causal", "documents")
        for how in (PLAIN, CAPPED)
    ]


@pytest.mark.parametrize(("given", "case", "how", "dtype"), CASES, ids=str)
def test_values_and_gradients_err_no_more_than_plain_torch(given, case, how, dtype):
    shape, rank, ranks = given
    b, h, kv, s, hd = shape
    first, until = (x.to(DEVICE) for x in keys_of(s, ContextGroup("", rank, ranks), case, b))
    gen = torch.Generator().manual_seed(0)
    draw = lambda n, t: torch.randn(b, t, n, hd, generator=gen, dtype=torch.float64)
    t = s // ranks
    q, k, v, dy = (
        draw(n, m).to(DEVICE, dtype).transpose(1, 2) for n, m in ((h, t), (kv, s), (kv, s), (h, t))
    )
    mask, spans = part_mask(first, until, s), make_part_spans(first, until, s)
    wide = [x.double() for x in (q, k, v)]
    by_torch = lambda *given: attention_reference(*given, *how)
    by_kernel = lambda *given: part_attention(*given, *how)
    exact = value_and_grads(by_torch, wide, dy.double(), mask)
    plain = value_and_grads(by_torch, (q, k, v), dy, mask)
    fused = value_and_grads(by_kernel, (q, k, v), dy, spans)
    for found, other, truth in zip(fused, plain, exact, strict=True):
        error = lambda x, truth=truth: (x.double() - truth).norm().item()
        assert found.dtype == other.dtype and found.shape == other.shape
        slack = 4 * torch.finfo(dtype).eps * truth.norm().item()
        assert error(found) <= error(other) + slack
    assert fused[0].transpose(1, 2).is_contiguous()  # so o_proj needs no copy
    again = value_and_grads(by_kernel, (q, k, v), dy, spans)
    assert all(torch.equal(x, y) for x, y in zip(fused, again, strict=True))


def test_second_derivative_raises():
    q = torch.randn(1, 2, 4, 16, requires_grad=True, device=DEVICE)
    k = torch.randn(1, 2, 8, 16, requires_grad=True, device=DEVICE)
    keys = torch.tensor([[0, 1, 6, 7]], device=DEVICE)
    y = part_attention(q, k, k, make_part_spans(torch.zeros_like(keys), keys, 8))
    with pytest.raises(RuntimeError, match=r"no second derivative.*without context parallel"):
        torch.autograd.grad(y.sum(), q, create_graph=True)
