"""Dequantisation: the reference, the op and the kernel give the same bits as bitsandbytes.

Without a GPU the kernel runs in Triton's interpreter, in fp32 and fp16. bf16 needs a GPU.
"""

import bitsandbytes.functional as bnb
import pytest
import torch

from fastlora.ops.quant import dequantize as dequantize_module
from fastlora.ops.quant.bitsandbytes import dequantize_by_bitsandbytes, quantize_4bit
from fastlora.ops.quant.dequantize import dense, dequantize, dequantize_reference, nf4_rounded
from fastlora.ops.quant.weights import (
    BLOCK,
    NestedAbsmax,
    Weight8bit,
    from_parts,
    parts,
    quant_type,
    shape_of,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Among them: blocks that span rows, an incomplete last block, several nested blocks, an odd number
# of values.
SHAPES = [(64, 64), (33, 8), (1, 2), (300, 130), (33, 7), (5, 5), (1, 1)]
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


def drawn(shape, dtype, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(*shape, generator=gen)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_bytes_statistics_and_values_equal_bitsandbytes(kind, nested, shape, dtype):
    weight = drawn(shape, dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type=kind
    )
    record = quantize_4bit(weight, quant_type=kind, nested=nested)
    assert shape_of(record) == shape and quant_type(record) == kind
    assert torch.equal(record.packed, packed.flatten())
    absmax = record.absmax.values if isinstance(record.absmax, NestedAbsmax) else record.absmax
    assert torch.equal(absmax, state.absmax)
    if isinstance(record.absmax, NestedAbsmax):
        own = (state.state2.absmax, state.state2.code, state.offset)
        assert all(map(torch.equal, record.absmax[1:], own))
    wanted = bnb.dequantize_4bit(packed, state).reshape(shape)  # transposed for a single byte
    for found in (dequantize(record, dtype), dequantize_reference(record, dtype)):
        assert found.dtype == dtype and torch.equal(found, wanted)
    assert torch.equal(dequantize_by_bitsandbytes(record), wanted)
    for wide in (torch.float32, torch.float64):  # values are rounded to the record's dtype first
        assert torch.equal(dequantize(record, wide), wanted.to(wide))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if CUDA or d != torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_kernel_equals_bitsandbytes_to_the_bit(kind, nested, shape, dtype):
    pytest.importorskip("triton", reason="requirements-test.txt has triton")
    from fastlora.ops.quant.dequantize_kernel import dequantize_4bit

    weight = drawn(shape, dtype)
    record = quantize_4bit(weight, quant_type=kind, nested=nested)
    found = dequantize_4bit(record, dtype)
    assert found.shape == shape and torch.equal(found, dequantize_by_bitsandbytes(record))
    assert torch.equal(dequantize_4bit(record, torch.float32), found.float())


def test_block_of_zeros_stays_zero():
    weight = drawn((4, 64), torch.float32)
    weight[1] = 0
    for nested in (True, False):
        record = quantize_4bit(weight, nested=nested)
        found = dequantize(record, torch.float32)
        assert torch.equal(found, dequantize_by_bitsandbytes(record))
        assert found[1].abs().max() <= (1e-2 if nested else 0)  # 8-bit absmax cannot represent 0


@pytest.mark.parametrize("columns", [64, 96, 4096])
@pytest.mark.parametrize("block", [32, 64, 128, 512, 4096])
def test_blocks_may_span_rows(block, columns):
    """On CPUs with AVX-512 bitsandbytes 0.50.2 gives wrong values for some of these shapes."""
    pytest.importorskip("triton", reason="requirements-test.txt has triton")
    from fastlora.ops.quant.dequantize_kernel import dequantize_4bit

    weight = (
        drawn((150, columns), torch.float32) * torch.linspace(1, 30, 150, device=DEVICE)[:, None]
    )
    record = quantize_4bit(weight, nested=False, block=block)
    found = dequantize(record, torch.float32)
    assert (found - weight).norm() < 0.13 * weight.norm()
    assert torch.equal(dequantize_reference(record, torch.float32), found)
    assert torch.equal(dequantize_4bit(record, torch.float32), found)
    if columns % block == 0:
        assert torch.equal(dequantize_by_bitsandbytes(record), found)


def test_bitsandbytes_is_not_called_on_the_cpu_if_blocks_span_rows(monkeypatch):
    record = quantize_4bit(torch.randn(40, 96))
    monkeypatch.setattr(dequantize_module, "dequantize_by_bitsandbytes", None)
    assert torch.equal(
        dequantize(record, torch.float32), dequantize_reference(record, torch.float32)
    )


def test_int8_equals_bitsandbytes():
    gen = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (33, 7), generator=gen, dtype=torch.int8)
    scale = torch.rand(33, generator=gen)
    record = Weight8bit(values, scale)
    wanted = bnb.int8_vectorwise_dequant(values, scale)
    assert shape_of(record) == (33, 7)
    assert torch.equal(dequantize(record, torch.float32), wanted)
    assert torch.equal(dequantize(record, torch.bfloat16), wanted.bfloat16())
    assert torch.equal(dequantize_by_bitsandbytes(record), wanted)


def test_from_parts_inverts_parts():
    weight = drawn((4, 64), torch.float32)
    eight = Weight8bit(weight.to(torch.int8), weight[:, 0].contiguous())
    for record in (weight, eight, quantize_4bit(weight), quantize_4bit(weight, nested=False)):
        again = from_parts(parts(record))
        assert type(again) is type(record)
        assert all(a is b for a, b in zip(parts(again), parts(record), strict=True))
    assert dense(weight, torch.bfloat16) is weight


def test_record_takes_no_more_memory_than_its_bytes_and_absmax():
    """The field `form`, which stores the shape, takes no memory on any device."""
    record = quantize_4bit(drawn((256, 256), torch.bfloat16))
    size = lambda t: t.untyped_storage().nbytes()
    assert size(record.form) == 0 and record.form.to("meta").numel() == 0
    of_blocks = record.packed.numel() // (BLOCK // 2)
    assert sum(map(size, parts(record))) <= record.packed.numel() + of_blocks + 2048


def test_nf4_rounding_has_the_known_error():
    weight = drawn((256, 256), torch.float32)
    error = (nf4_rounded(weight) - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    assert 0.085 < error < 0.1  # 0.092 for normally distributed weights


@pytest.mark.parametrize("nested", [True, False])
def test_dequantize_composes_with_torch_func(nested):
    """Transforms of a function that multiplies with the matrix treat it as a constant."""
    record = quantize_4bit(drawn((8, 6), torch.float32), nested=nested)
    plain, x = dequantize(record, torch.float32), torch.linspace(-1, 1, 6, device=DEVICE)
    run = lambda weight: lambda x: (weight() @ x).square().sum()
    ours, theirs = run(lambda: dequantize(record, torch.float32)), run(lambda: plain)
    torch.testing.assert_close(torch.func.grad(ours)(x), torch.func.grad(theirs)(x))
    stack = torch.stack([x, 2 * x])
    per_row = lambda f: torch.vmap(torch.func.grad(f))(stack)
    torch.testing.assert_close(per_row(ours), per_row(theirs))
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (x,)), torch.func.jvp(theirs, (x,), (x,)))
    torch.testing.assert_close(torch.func.hessian(ours)(x), torch.func.hessian(theirs)(x))
