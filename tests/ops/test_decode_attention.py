"""decode_attention: errs no more than SDPA in the same dtype, relative to float64, at all lengths.

Without a GPU the kernel runs in Triton's interpreter, in fp32 and fp16. bf16 needs a GPU.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fastlora.ops.attention.rope import apply_rope
from fastlora.ops.decode.attention import (
    decode_attention,
    decode_attention_reference,
    decode_kernel_supports,
)

pytest.importorskip("triton", reason="the kernels' tests need triton: requirements-test.txt has it")

from fastlora.ops.decode.attention_kernel import Card, Tile, decode_forward, tile
from oracles.decode_attention import CUDA, DEVICE, S, by_sdpa, copied, drawn

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]

# (query heads, key heads, head size): Llama's 1B and 8B, a size that is no power of two, one key
# head for all and for one query head, and more query heads per key head than a tile has rows.
HEADS = [(8, 2, 64), (8, 2, 128), (6, 2, 96), (2, 2, 16), (5, 1, 32), (20, 1, 16)]
ids = lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else str(x)


@pytest.mark.parametrize("window", [None, 1, 70, S + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("heads", HEADS, ids=ids)
def test_kernel_errs_no_more_than_sdpa(heads, dtype, window):
    given = drawn(heads, dtype, rotated=heads[2] > 32)
    exact = by_sdpa(copied(given, torch.float64), window)
    plain = by_sdpa(given, window)
    found = decode_attention(*copied(given), window, kernels="triton")
    assert found.dtype == dtype and found.shape == exact.shape and found.isfinite().all()
    for mine, other, truth in zip(found.double(), plain.double(), exact, strict=True):
        # In float32 the kernel adds the terms of a score in sequence, and exp2 is approximate: 5
        # eps on an H200, where SDPA's error is 1.5 (8B's heads).
        slack = (8 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps * truth.norm()
        assert (mine - truth).norm() <= (other - truth).norm() + slack


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("window", [None, 70])
def test_float32_equals_float64(window, kernels):
    given = drawn(HEADS[0], torch.float32)
    exact = by_sdpa(copied(given, torch.float64), window)
    given[5:7] = [x.nan_to_num() for x in given[5:7]]  # the reference reads unused entries too
    found = decode_attention(*given, window, kernels=kernels)
    assert (found - exact).abs().max() <= 1e-5 * max(1, exact.abs().max())


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_only_the_new_entries_of_the_caches_change(kernels):
    given = drawn(HEADS[0], torch.float32)
    given[5:7] = [x.nan_to_num() for x in given[5:7]]
    _, k, v, cos, sin, k_cache, v_cache, lengths = copied(given)
    decode_attention(*given, None, kernels=kernels)
    for i, n in enumerate(lengths.clamp(max=S - 1).tolist()):
        rotated = apply_rope(k[i : i + 1, :, None], cos[i : i + 1, None], sin[i : i + 1, None])
        k_cache[i, :, n] = rotated[0, :, 0]
        v_cache[i, :, n] = v[i]
    torch.testing.assert_close(given[5], k_cache)
    assert torch.equal(given[6], v_cache)
    assert torch.equal(given[7], lengths)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_tokens_one_by_one_equal_causal_attention(kernels):
    """So a step reads what the steps before it wrote."""
    h, kv, hd, t = 4, 2, 16, 20
    gen = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, t, hd, generator=gen).to(DEVICE) for n in (h, kv, kv))
    angles = torch.rand(2, t, hd // 2, generator=gen).repeat(1, 1, 2).to(DEVICE)
    cos, sin = angles.cos(), angles.sin()
    caches = [torch.zeros(2, kv, 32, hd, device=DEVICE) for _ in range(2)]
    lengths = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    steps = []
    for i in range(t):
        new = (x[:, :, i] for x in (q, k, v))
        tables = (cos[:, i], sin[:, i])
        steps.append(decode_attention(*new, *tables, *caches, lengths, None, kernels=kernels))
        lengths += 1
    wanted = F.scaled_dot_product_attention(
        apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(torch.stack(steps, 2), wanted, rtol=1e-5, atol=1e-5)


def test_inputs_and_slots_may_have_other_layouts():
    given = drawn(HEADS[0], torch.float32)
    wanted = decode_attention(*copied(given), None, kernels="triton")
    q, k, v, cos, sin, k_cache, v_cache, lengths = given
    joint = torch.cat([x.flatten(1) for x in (q, k, v)], 1)  # one product's columns
    q, k, v = (x.unflatten(1, (-1, 64)) for x in joint.split([512, 128, 128], 1))
    caches = torch.stack([k_cache, v_cache], 1).unbind(1)  # keys and values of a slot adjacent
    assert decode_kernel_supports(q, *caches)
    found = decode_attention(q, k, v, cos, sin, *caches, lengths, None, kernels="triton")
    assert torch.equal(found, wanted)


def test_equal_calls_give_equal_bits():
    given = drawn(HEADS[0], torch.float32)
    runs = [decode_attention(*copied(given), None, kernels="triton") for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 40])
def test_result_is_the_same_for_any_number_of_parts(splits):
    """Also if there are more parts than blocks of keys, or than the second kernel's chunk."""
    given = drawn(HEADS[0], torch.float32, s=S)
    exact = by_sdpa(copied(given, torch.float64), 150)
    found = decode_forward(*given, 150, Tile(keys=16, splits=splits))
    assert (found - exact).abs().max() <= 1e-5 * max(1, exact.abs().max())


def test_scores_of_any_size_give_finite_results():
    for factor in (0.0, 1e3, -1e3, 1e9):
        given = drawn(HEADS[0], torch.float32)
        given[0] *= factor
        exact = by_sdpa(copied(given, torch.float64), None)
        found = decode_attention(*given, None, kernels="triton")
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_unsupported_tensors_run_the_reference():
    given = drawn(HEADS[0], torch.float64)
    given[5:7] = [x.nan_to_num() for x in given[5:7]]
    assert not decode_kernel_supports(given[0], *given[5:7])
    wanted = decode_attention_reference(*copied(given), 70)
    assert torch.equal(decode_attention(*given, 70), wanted)
    spread = [x.float().transpose(1, 2).contiguous().transpose(1, 2) for x in given[5:7]]
    assert not decode_kernel_supports(given[0].float(), *spread)


def test_result_has_no_gradient():
    given = drawn(HEADS[0], torch.float32)
    given[0].requires_grad_()
    assert not decode_attention(*given, None, kernels="triton").requires_grad


@pytest.mark.parametrize("shared", [65536, 101376, 232448])
@pytest.mark.parametrize("b", [1, 4, 32, 256])
def test_programs_fill_the_card_and_blocks_fit_its_shared_memory(b, shared):
    for seen, head_dim, itemsize in product((1, 128, 2048, 131072), (64, 96, 128), (2, 4)):
        how = tile(8 * b, seen, head_dim, itemsize, Card(132, shared, pdl=True))
        assert how.splits == 1 or 8 * b * how.splits <= 2 * 132
        assert (how.splits > 1) == (seen == 131072 or seen == 2048) or 8 * b > 66
        assert 4 * how.keys * head_dim * itemsize < shared
