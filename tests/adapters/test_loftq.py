"""The factors of LoftQ and the randomised decomposition beneath PiSSA."""

import pytest
import torch

from fastlora.adapters.init.decompositions import randomised_svd
from fastlora.adapters.init.from_weights import projection_factors
from fastlora.adapters.init.loftq import QUANTISERS, LoftQSettings, int8_rounded


def weights():
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(0))


def loftq_error(bits, iterations, scaling, r=8):
    """||W - (Q + s B0 A0)||, where Q is the quantised remainder of the last iteration."""
    w, gen = weights(), torch.Generator()
    before = None
    if iterations > 1:
        before = projection_factors(
            w, "loftq", r, scaling, gen, LoftQSettings(bits, iterations - 1)
        )
    rest = w if before is None else w - scaling * before.b @ before.a
    found = projection_factors(w, "loftq", r, scaling, gen, LoftQSettings(bits, iterations))
    return (w - QUANTISERS[bits](rest) - scaling * found.b @ found.a).norm().item()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_as_close_for_every_scaling(bits, iterations):
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    one, two, half = (loftq_error(bits, iterations, s) for s in (1.0, 2.0, 0.5))
    assert two == pytest.approx(one, rel=1e-4) and half == pytest.approx(one, rel=1e-4)
    w = weights()
    assert one < 0.9 * (w - QUANTISERS[bits](w)).norm().item()


@pytest.mark.parametrize(("bits", "iterations"), [(4, 1), (4, 3), (8, 1)])
def test_loftq_at_scaling_1_is_the_loop_of_peft(bits, iterations):
    """PEFT's loop needs CUDA. This is the same loop over functions of bitsandbytes."""
    bnb = pytest.importorskip("bitsandbytes").functional
    # Half: bitsandbytes quantises a half-precision copy to 8 bits, of later rests another one.
    w, r = weights().half().float(), 8
    rest = w
    for _ in range(iterations):
        if bits == 4:
            q = bnb.dequantize_4bit(
                *bnb.quantize_4bit(rest, compress_statistics=False, quant_type="nf4")
            )
        else:
            q = bnb.int8_vectorwise_dequant(*bnb.int8_vectorwise_quant(rest.half())[:2]).float()
        u, s, vh = torch.linalg.svd(w - q)
        product = u[:, :r] @ torch.diag(s[:r]) @ vh[:r]
        rest = w - product
    found = projection_factors(
        w, "loftq", r, 1.0, torch.Generator(), LoftQSettings(bits, iterations)
    )
    torch.testing.assert_close(found.b @ found.a, product, rtol=0, atol=1e-5)


def test_int8_rows_err_by_half_a_step():
    w = torch.cat([weights(), torch.zeros(1, 64)])
    step = w.abs().amax(-1, keepdim=True) / 127
    assert ((int8_rounded(w) - w).abs() <= step / 2 + 1e-7).all()


def test_randomised_svd_finds_the_largest_directions():
    gen = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(40, 20, generator=gen))
    v, _ = torch.linalg.qr(torch.randn(30, 20, generator=gen))
    w = u @ torch.diag(2.0 ** -torch.arange(20)) @ v.T
    left, s, right = randomised_svd(w, 4, 4, gen)
    torch.testing.assert_close(s, 2.0 ** -torch.arange(4), rtol=1e-4, atol=0)
    best = u[:, :4] @ torch.diag(s) @ v[:, :4].T
    torch.testing.assert_close(left @ torch.diag(s) @ right, best, rtol=0, atol=1e-3)
