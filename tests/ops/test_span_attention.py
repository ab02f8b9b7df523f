"""span_attention: its block lists say what a mask says; its values are the masked reference's.

flex_attention has no backward pass on the CPU: gradients are scripts/gpu_check.py's business
("packed", windows and deterministic=True), where bf16 under every policy is held against fp32.
"""

import pytest
import torch
from torch import Tensor

from fastlora.llama.positions import attention_mask_2d, first_seen
from fastlora.ops.attention import attention_reference
from fastlora.ops.span_attention import BLOCK, Spans, span_attention, spans, takes

CPU = torch.device("cpu")
T = 5 * BLOCK


def packed(*lengths: int) -> Tensor:
    """One row of documents; the rest of it is padding, a document of its own."""
    lengths = (*lengths, T - sum(lengths))
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


SEGMENTS = {
    "none": None,
    "one document": torch.stack([packed(), packed()]),
    "at blocks": torch.stack([packed(BLOCK, 2 * BLOCK), packed(BLOCK)]),
    "anywhere": torch.stack([packed(1, 200, 3, 129, 100), packed(300, 7)]),
    "many": torch.stack([torch.arange(T) // 5, torch.arange(T)]),
    "an id again": (torch.arange(T) // 100 % 2).expand(2, T),
}
WINDOWS = [None, 1, 50, BLOCK, 300, T + 1]


def lists_as_mask(numbers: Tensor, lists: Tensor) -> Tensor:
    """[b, n, n], True where a block is on the list of its row."""
    b, _, n = numbers.shape
    seen = torch.zeros(b, n, n, dtype=torch.bool)
    for row, i in ((row, i) for row in range(b) for i in range(n)):
        seen[row, i, lists[row, 0, i, : int(numbers[row, 0, i])].long()] = True
    return seen


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_the_lists_are_the_blocks_of_the_mask(segments, window):
    first = first_seen(T, window, segments, CPU).expand(2, T)
    made = spans(first)
    mask = attention_mask_2d(T, window, None, segments, CPU)
    if mask is None:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    n = T // BLOCK
    blocks = mask.expand(2, 1, T, T).view(2, n, BLOCK, n, BLOCK).transpose(2, 3).flatten(3)
    whole, seen = blocks.all(-1), blocks.any(-1)
    assert lists_as_mask(made.keys, made.key_list).equal(seen & ~whole)
    assert lists_as_mask(made.whole_keys, made.whole_key_list).equal(whole)
    of_keys = lambda x: x.transpose(1, 2)
    assert lists_as_mask(made.queries, made.query_list).equal(of_keys(seen & ~whole))
    assert lists_as_mask(made.whole_queries, made.whole_query_list).equal(of_keys(whole))
    assert all(x.is_contiguous() for x in made)  # as the kernel reads them


def drawn(h: int, kv: int, hd: int) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, T, hd, generator=gen, dtype=torch.float64) for n in (h, kv, kv))
    return q, k, v


@pytest.mark.compile  # flex_attention asks dynamo to trace the mask, eager too
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("segments", [SEGMENTS["anywhere"], SEGMENTS["many"], None])
def test_values_are_those_of_the_mask(segments, window, heads):
    q, k, v = drawn(*heads, 16)
    made = spans(first_seen(T, window, segments, CPU).expand(2, T))
    expected = attention_reference(q, k, v, attention_mask_2d(T, window, None, segments, CPU))
    ours = span_attention(q.float(), k.float(), v.float(), made)
    torch.testing.assert_close(ours, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.compile  # flex_attention asks dynamo to trace the mask, eager too
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_another_span_is_another_value():
    q, k, v = (x.float() for x in drawn(2, 2, 16))
    given = [spans(first_seen(T, w, None, CPU).expand(2, T)) for w in (50, 51)]
    first, second = (span_attention(q, k, v, where) for where in given)
    assert not torch.allclose(first[:, :, 60:], second[:, :, 60:], atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "t", "taken"),
    [
        (torch.bfloat16, 64, 2048, True),
        (torch.float16, 128, BLOCK, True),
        (torch.float32, 64, 2048, False),
        (torch.bfloat16, 80, 2048, False),
        (torch.bfloat16, 64, 2047, False),
    ],
)
def test_what_the_kernel_takes(dtype, head_dim, t, taken):
    assert takes(dtype, head_dim, t) is taken


def test_the_number_of_launches_does_not_hang_on_the_documents():
    """Nothing is read back: the same shapes from any packing."""
    shapes = {tuple(x.shape for x in spans(packed(*p)[None])) for p in ((), (1, 2, 3))}
    assert len(shapes) == 1
    assert isinstance(spans(packed()[None]), Spans)
