"""flash_attention: spans equal masks; values and gradients err no more than plain torch under the
same mask, relative to float64.

Without a GPU the kernels run in Triton's interpreter, in fp32 and fp16. bf16 needs a GPU.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from fastlora import functional as FL
from fastlora.models.positions import attention_mask_2d, first_seen
from fastlora.ops.attention.attention import attention_reference
from fastlora.ops.attention.flash import (
    Spans,
    flash_attention,
    kernel_is_faster,
    kernel_supports,
    make_spans,
)
from fastlora.ops.attention.rope import apply_rope
from oracles.pairs import adapted
from oracles.trees import relative_error, token_ids

pytest.importorskip("triton", reason="the kernels' tests need triton: requirements-test.txt has it")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


def packed(t: int, *lengths: int) -> Tensor:
    """Segment ids of one row of documents; the rest of the row is padding with one more id."""
    lengths = (*lengths, t - sum(lengths))
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


T = 320
SEGMENTS = {
    "none": None,
    "one document": torch.stack([packed(T), packed(T)]),
    "at block edges": torch.stack([packed(T, 64, 128), packed(T, 64)]),
    "inside blocks": torch.stack([packed(T, 1, 100, 3, 65, 30), packed(T, 130, 7)]),
    "many": torch.stack([torch.arange(T) // 5, torch.arange(T)]),
    "repeated ids": (torch.arange(T) // 50 % 2).expand(2, T),
}
WINDOWS = [None, 1, 50, 64, 200, T + 1]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_spans_equal_the_mask(segments, window):
    cpu = torch.device("cpu")
    made = make_spans(first_seen(T, window, segments, cpu).expand(2, T))
    mask = attention_mask_2d(T, window, None, segments, cpu)
    mask = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask[:, 0]
    i = torch.arange(T)
    assert ((i <= i[:, None]) & (i >= made.first[..., None])).equal(mask.expand(2, T, T))
    assert ((i >= i[:, None]) & (i <= made.last[..., None])).equal(mask.mT.expand(2, T, T))
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in made)  # the kernels need both


def drawn(shape, dtype) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor]]:
    """([q, k, v] in the projections' layout, the output's gradient, RoPE tables per row)."""
    b, h, kv, t, hd = shape
    gen = torch.Generator().manual_seed(0)
    new = lambda n: torch.randn(b, t, n, hd, generator=gen, dtype=torch.float64)
    *qkv, dy = (new(n).to(DEVICE, dtype).transpose(1, 2) for n in (h, kv, kv, h))
    angles = 6 * torch.rand(b, t, hd // 2, generator=gen, dtype=torch.float64).repeat(1, 1, 2)
    return qkv, dy, (angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype))


def reference(q, k, v, rope, spans: Spans | None) -> Tensor:
    if rope is not None:
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    if spans is None:
        return attention_reference(q, k, v, None)
    i = torch.arange(q.shape[2], device=q.device)
    return attention_reference(
        q, k, v, ((i <= i[:, None]) & (i >= spans.first[..., None]))[:, None]
    )


def value_and_grads(fn, qkv, dy, rope, spans):
    leaves = [x.detach().requires_grad_() for x in qkv]
    y = fn(*leaves, rope, spans)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def seen(case: str, b: int, t: int) -> Spans | None:
    """The spans of a case: plain causal, several documents, or a sliding window."""
    first = {
        "causal": None,
        "documents": torch.stack([packed(t, t // 3, t // 2), packed(t, t // 7)])[:b],
        "window": 20,
    }[case]
    if first is None:
        return None
    window, segments = (first, None) if isinstance(first, int) else (None, first)
    found = first_seen(t, window, segments, torch.device("cpu")).expand(b, t)
    return Spans(*(x.to(DEVICE) for x in make_spans(found)))


# (b, query heads, key heads, t, hd). Lengths below, at and above multiples of a tile's; key heads
# for one, several or all query heads; head sizes for both sets of tiles.
SHAPES = [(2, 4, 2, 20, 16), (2, 2, 2, 128, 16), (1, 4, 1, 200, 64), (1, 2, 1, 150, 128)]


@pytest.mark.parametrize("case", ["causal", "documents", "window"])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_err_no_more_than_plain_torch(shape, dtype, rotated, case):
    qkv, dy, tables = drawn(shape, dtype)
    spans, rope = seen(case, shape[0], shape[3]), tables if rotated else None
    wide = None if rope is None else tuple(x.double() for x in rope)
    exact = value_and_grads(reference, [x.double() for x in qkv], dy.double(), wide, spans)
    plain = value_and_grads(reference, qkv, dy, rope, spans)
    fused = value_and_grads(flash_attention, qkv, dy, rope, spans)
    for found, other, truth in zip(fused, plain, exact, strict=True):
        error = lambda x, truth=truth: (x.double() - truth).norm().item()
        assert found.dtype == other.dtype and found.shape == other.shape
        slack = 4 * torch.finfo(dtype).eps * truth.norm().item()
        assert error(found) <= error(other) + slack
    assert fused[0].transpose(1, 2).is_contiguous()  # so o_proj needs no copy


@pytest.mark.parametrize("case", ["causal", "documents"])
@pytest.mark.parametrize("hd", [16, 128])
def test_descriptors_load_the_same_values(hd, case, monkeypatch):
    """Hopper's copy engine loads the tiles. Offsets of the second row and of other heads count."""
    qkv, dy, rope = drawn((2, 4, 2, 128, hd), torch.float16)
    spans, used = seen(case, 2, 128), []
    by_pointers = value_and_grads(flash_attention, qkv, dy, rope, spans)
    decide = lambda loaded, how: used.append(how["EVEN"]) or how["EVEN"]
    monkeypatch.setattr("fastlora.ops.attention.flash_kernel._takes_descriptors", decide)
    by_descriptors = value_and_grads(flash_attention, qkv, dy, rope, spans)
    assert used == [True, True] and all(map(torch.equal, by_descriptors, by_pointers))


def test_descriptors_are_of_aligned_tiles_in_16_bits_on_hopper(monkeypatch):
    from fastlora.ops.attention import flash_kernel

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    takes = lambda *xs, even=True: flash_kernel._takes_descriptors(xs, dict(EVEN=even))
    with FakeTensorMode():
        new = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="cuda")
        x = new(2, 64, 4, 128).transpose(1, 2)
        assert takes(x, x) and not takes(x, x, even=False)
        for other in (
            new(2, 64, 4, 64).transpose(1, 2),
            new(2, 64, 4, 128, dtype=torch.float32).transpose(1, 2),
            new(0, 64, 4, 128).transpose(1, 2),  # a descriptor of no rows is an error
        ):
            assert not takes(other, other)
        for token, offset in ((640, 1), (513, 0)):  # neither is a multiple of 16 bytes
            strides = (64 * token, 128, token, 1)
            assert not takes(x, new(2 * 64 * 640).as_strided((2, 4, 64, 128), strides, offset))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 0))
    assert not takes(x, x)


def test_single_token_attends_to_itself():
    qkv, dy, rope = drawn((2, 4, 2, 1, 16), torch.float32)
    y, dq, dk, dv = value_and_grads(flash_attention, qkv, dy, rope, None)
    torch.testing.assert_close(y, qkv[2].repeat_interleave(2, 1))
    torch.testing.assert_close(dv, dy.unflatten(1, (2, 2)).sum(2))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-6


def test_rope_tables_of_one_row_broadcast_to_all_rows():
    qkv, dy, (cos, sin) = drawn((2, 2, 1, 40, 16), torch.float32)
    one = value_and_grads(flash_attention, qkv, dy, (cos[:1], sin[:1]), None)
    each = (cos[:1].expand(2, -1, -1), sin[:1].expand(2, -1, -1))
    torch.testing.assert_close(one, value_and_grads(flash_attention, qkv, dy, each, None))


def test_scores_of_any_size_give_finite_results():
    """Also if one score is far larger than all others, and if all are 0 or very large."""
    (q, k, v), dy, _ = drawn((1, 2, 1, 100, 16), torch.float32)
    for factor in (0.0, 1e3, -1e3, 1e9):
        found = value_and_grads(flash_attention, [q * factor, k, v], dy, None, None)
        wanted = value_and_grads(reference, [q * factor, k, v], dy, None, None)
        assert all(x.isfinite().all() for x in found)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)


def test_inputs_may_have_other_layouts():
    qkv, dy, rope = drawn((2, 4, 2, 40, 16), torch.float32)
    wanted = value_and_grads(flash_attention, qkv, dy, rope, None)
    heads_first = [x.contiguous() for x in qkv]
    torch.testing.assert_close(
        value_and_grads(flash_attention, heads_first, dy.contiguous(), rope, None), wanted
    )
    fused = torch.cat([x.transpose(1, 2).flatten(2) for x in qkv], 2)  # one product's columns
    slices = [x.unflatten(2, (-1, 16)).transpose(1, 2) for x in fused.split([64, 32, 32], 2)]
    torch.testing.assert_close(value_and_grads(flash_attention, slices, dy, rope, None), wanted)


def test_equal_calls_give_equal_bits():
    qkv, dy, rope = drawn((2, 4, 2, 200, 16), torch.float32)
    runs = [value_and_grads(flash_attention, qkv, dy, rope, None) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_second_derivative_raises():
    qkv, dy, rope = drawn((1, 2, 1, 20, 16), torch.float32)
    leaves = [x.requires_grad_() for x in qkv]
    with pytest.raises(RuntimeError, match=r"no second derivative.*torch\.func"):
        torch.autograd.grad(flash_attention(*leaves, rope, None), leaves, dy, create_graph=True)


def test_saved_tensors_grow_linearly_with_the_tokens():
    """No scores are saved, only rotated q and k, v, the result and one number per query."""
    qkv, _, rope = drawn((2, 4, 2, 150, 16), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        flash_attention(*(x.requires_grad_() for x in qkv), rope, None)
    tables = sum(x.numel() for x in rope)
    assert sum(x.numel() for x in kept) == 2 * 150 * ((4 + 2 + 2 + 4) * 16 + 4) + tables


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "t", "supported"),
    [
        (torch.bfloat16, 32, 64, 2048, True),
        (torch.float16, 32, 128, 77, True),
        (torch.float32, 32, 64, 2048, False),
        (torch.bfloat16, 32, 80, 2048, False),
        (torch.bfloat16, 8, 256, 8192, True),
        (torch.bfloat16, 32, 128, 2**19, False),
    ],
)
def test_kernels_support_these_dtypes_and_sizes(dtype, heads, head_dim, t, supported):
    assert kernel_supports(dtype, heads, head_dim, t) is supported


def test_kernels_are_faster_than_cudnn_up_to_these_lengths():
    assert kernel_is_faster(64, 8192) and kernel_is_faster(128, 2048)
    assert not kernel_is_faster(64, 8193) and not kernel_is_faster(128, 2049)


def test_shapes_of_spans_do_not_depend_on_the_documents():
    """So grids and launches are the same for every packing, without a synchronisation."""
    shapes = {tuple(x.shape for x in make_spans(packed(T, *p)[None])) for p in ((), (1, 2, 3))}
    assert len(shapes) == 1


# ── in the model ──────────────────────────────────────────────────────────────────────────

IDS = token_ids(2, 30, vocab_size=96)
FAMILIES = ["llama3.2", "qwen3", "smollm3", "mistral", "mixtral", "gemma2", "phi3", "phi4_mini"]


def gradients(model, segments=None, **how):
    spec = model.with_spec(**how).spec
    batch = {"input_ids": IDS, "labels": IDS}
    batch |= {} if segments is None else {"segment_ids": segments}
    return fastlora.value_and_grad(FL.loss)(model.adapter, model.base, spec, batch, seed=5)


@pytest.fixture
def always_supported(monkeypatch) -> None:
    """The model uses the kernels for every dtype, head size and length."""
    monkeypatch.setattr("fastlora.models.decoder.kernel_supports", lambda *_: True)
    monkeypatch.setattr("fastlora.models.attention.flash.kernel_supports", lambda *_: True)
    monkeypatch.setattr("fastlora.models.attention.flash.kernel_is_faster", lambda *_: True)


@pytest.fixture
def called(monkeypatch, always_supported) -> list:
    """The spans of each call of flash_attention."""
    calls = []

    def call(q, k, v, rope, spans, *rest):
        calls.append(spans)
        return flash_attention(q, k, v, rope, spans, *rest)

    monkeypatch.setattr("fastlora.models.attention.flash_attention", call)
    return calls


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_without_the_kernels(family, packs, pair, called):
    model = adapted(pair(family).model.to(DEVICE), r=3)
    segments = torch.stack([packed(30, 11, 7), packed(30, 1)]) if packs else None
    plain = gradients(model, segments, kernels="torch")
    assert not called
    fused = gradients(model, segments, kernels="triton")
    types = model.spec.config.layer_types
    expected = [packs or t == "sliding_attention" for t in types]
    assert [x is not None for x in called[: len(types)]] == expected  # then they are recomputed
    assert abs(fused[0] - plain[0]) <= 1e-5 and relative_error(fused[1], plain[1]) <= 2e-4


@pytest.mark.parametrize("recompute", ["selective", "full", 0.4, 0.2])
def test_every_policy_gives_the_same_gradients(recompute, pair, called):
    model = adapted(pair("llama3.2").model.to(DEVICE), r=3)
    wanted = gradients(model, kernels="triton", recompute="none")
    found = gradients(model, kernels="triton", recompute=recompute)
    assert relative_error(found[1], wanted[1]) <= 1e-6


@pytest.mark.compile
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_of_compiled_layers_equal_eager(
    recompute, pair, always_supported, region_backend
):
    if recompute != "selective":  # Inductor's C++ takes most of the time
        region_backend("aot_eager")
    model = adapted(pair("llama3.2").model.to(DEVICE), r=3)
    segments = torch.stack([packed(30, 11, 7), packed(30, 1)])
    for given in (None, segments):
        eager = gradients(model, given, kernels="triton", recompute=recompute)
        compiled = gradients(model, given, kernels="triton", recompute=recompute, compile=True)
        assert abs(compiled[0] - eager[0]) <= 1e-5
        assert relative_error(compiled[1], eager[1]) <= 2e-4


def test_slower_kernels_run_only_for_spans_and_for_determinism(pair, called, monkeypatch):
    monkeypatch.setattr("fastlora.models.attention.flash.kernel_is_faster", lambda *_: False)
    model = adapted(pair("llama3.2").model.to(DEVICE), r=3)
    gradients(model, kernels="triton")
    assert not called
    gradients(model, kernels="triton", deterministic=True)
    assert called and all(x is None for x in called)
    called.clear()
    gradients(model, packed(30, 11).expand(2, -1), kernels="triton")
    assert called and all(x is not None for x in called)


def test_slower_kernels_run_if_scores_have_a_cap(pair, called, monkeypatch):
    monkeypatch.setattr("fastlora.models.attention.flash.kernel_is_faster", lambda *_: False)
    gradients(adapted(pair("gemma2").model.to(DEVICE), r=3), kernels="triton")
    assert [x is None for x in called[:2]] == [False, True]


def test_padding_masks_do_not_use_the_kernels(pair, called):
    model = pair("llama3.2").model.to(DEVICE).with_spec(kernels="triton")
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    model(IDS.to(DEVICE), attention_mask=mask.to(DEVICE))
    assert not called
