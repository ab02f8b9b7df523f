"""dropout: statistics of the masks, and equal masks for equal keys."""

import math

import pytest
import torch

from fastlora.ops.dropout import dropout, fold, from_row, hash32, keep_mask, key_and_row, low_word

CPU = torch.device("cpu")
N, D = 512, 512
# Standard deviations. All tests of this file together reject a perfect hash once in 10,000 runs.
TAIL = 5.0


def mask(seed: int, p: float = 0.5, n: int = N, d: int = D) -> torch.Tensor:
    return keep_mask(torch.tensor(seed), n, d, p, CPU)


def z_score(hits: torch.Tensor, p: float) -> float:
    """How many standard deviations a count of independent draws is from its mean."""
    n = hits.numel()
    return abs(hits.double().sum().item() - n * p) / math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, -1, 3407, 2**40, 2**63 - 1])
def test_share_of_dropped_elements_is_p(seed, p):
    assert z_score(~mask(seed, p), p) < TAIL


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_and_columns_drop_equal_shares(dim):
    """Chi-square of the counts per row and per column."""
    counts = (~mask(7, 0.2)).sum(dim).double()
    n = N if dim == 0 else D
    chi = ((counts - 0.2 * n) ** 2 / (0.2 * 0.8 * n)).sum().item()
    assert abs(chi - len(counts)) < TAIL * math.sqrt(2 * len(counts))


NEIGHBOURS = {
    "next column": lambda m: (m[:, 1:], m[:, :-1]),
    "other half of the hash": lambda m: (
        m.view(N, -1, 2, 64)[:, :, 0],
        m.view(N, -1, 2, 64)[:, :, 1],
    ),
    "next row": lambda m: (m[1:], m[:-1]),
    "diagonal": lambda m: (m[1:, 1:], m[:-1, :-1]),
    "256 columns apart": lambda m: (m[:, 256:], m[:, :256]),
    "256 rows apart": lambda m: (m[256:], m[:256]),
    "transpose": lambda m: (m[:256, 256:], m.t()[:256, 256:]),
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_elements_are_independent_of_their(neighbour):
    a, b = NEIGHBOURS[neighbour](mask(11))
    assert z_score(a == b, 0.5) < TAIL


@pytest.mark.parametrize("other", [1, 2, 2**31, 2**32, 2**40, -1])
def test_seeds_are_independent(other):
    key = lambda seed: fold(torch.tensor(seed), 0)
    a, b = (keep_mask(key(s), N, D, 0.5, CPU) for s in (0, other))
    assert z_score(a == b, 0.5) < TAIL


def test_masks_of_layers_and_projections_are_independent():
    keys = [fold(fold(torch.tensor(5), layer), salt) for layer in range(4) for salt in range(7)]
    assert len({int(k) for k in keys}) == 28
    masks = [keep_mask(k, 64, 64, 0.5, CPU) for k in keys]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert z_score(a == b, 0.5) < TAIL


def test_folding_a_tensor_of_numbers_equals_folding_each():
    for seed in (5, -3, 2**40 + 77):
        key = torch.tensor(seed)
        keys = fold(key, torch.arange(7))
        assert keys.dtype == torch.int64
        assert torch.equal(keys, torch.stack([fold(key, i) for i in range(7)]))


def test_hash_is_one_to_one_and_each_input_bit_flips_half_the_output_bits():
    x = torch.arange(2**16, dtype=torch.int32)
    h = hash32(x)
    assert h.dtype == torch.int32 and len(h.unique()) == 2**16
    for bit in range(32):
        changed = h ^ hash32(x ^ low_word(torch.tensor(1 << bit)))
        flips = sum(((changed >> k) & 1).double().mean().item() for k in range(32)) / 32
        assert abs(flips - 0.5) < 0.01


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.93])
@pytest.mark.parametrize("seed", [0, 1, -3, 12345, 2**31 + 5, 2**32 - 1, 2**40 + 77])
def test_mask_equals_the_algorithm_in_unbounded_integers(seed, p):
    """int32 products must wrap as the algorithm's unsigned 32-bit products do. Columns j and j + 64
    have the two halves of one hash, as signed 16-bit numbers."""
    word = 0xFFFFFFFF

    def mixed(x: int) -> int:
        x = ((x ^ x >> 16) * 0x21F0AAAD) & word
        x = ((x ^ x >> 15) * 0x735A2D97) & word
        return x ^ x >> 15

    def kept(row: int, column: int) -> bool:
        block, half, number = column // 128, column // 64 % 2, column % 64
        bits = mixed((row + (64 * block + number) * 0x9E3779B1) & word)
        # As a signed number, v is (v ^ 0x8000) - 2**15.
        return ((bits >> 16 if half else bits & 0xFFFF) ^ 0x8000) >= round(p * 2**16)

    rows = [mixed((i ^ seed) & word) for i in range(9)]
    wanted = [[kept(r, j) for j in range(200)] for r in rows]
    assert torch.equal(mask(seed, p, 9, 200), torch.tensor(wanted))


def test_kept_values_are_scaled_and_others_are_zero():
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    y = dropout(x, 0.25, torch.tensor(3))
    keep = mask(3, 0.25, 10, 64).view(2, 5, 64)
    assert torch.equal(y, torch.where(keep, x / 0.75, 0.0))
    assert not keep.all() and keep.any()


def test_dropout_without_a_key_or_with_p_0_is_the_identity():
    x = torch.randn(1, 2, 3)
    assert dropout(x, 0.5, None) is x and dropout(x, 0.0, torch.tensor(1)) is x


def test_equal_keys_give_equal_masks():
    x = torch.randn(2, 5, 64)
    assert torch.equal(dropout(x, 0.25, torch.tensor(3)), dropout(x, 0.25, torch.tensor(3)))


def test_gradient_has_the_same_mask():
    x = torch.randn(2, 5, 64, requires_grad=True)
    y = dropout(x, 0.25, torch.tensor(3))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx != 0, y != 0)
    assert torch.equal(
        dx, torch.func.grad(lambda x: dropout(x, 0.25, torch.tensor(3)).sum())(x.detach())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mask_does_not_depend_on_the_dtype(dtype):
    x = torch.ones(1, 4, 64)
    a, b = (dropout(t, 0.25, torch.tensor(3)) for t in (x, x.to(dtype)))
    assert b.dtype == dtype and torch.equal(a != 0, b != 0)


def test_vmap_over_keys_equals_a_loop():
    x, keys = torch.ones(2, 3, 16), torch.tensor([1, 2, 2**40])
    batched = torch.vmap(lambda key: dropout(x, 0.3, fold(key, 2)))(keys)
    assert torch.equal(batched, torch.stack([dropout(x, 0.3, fold(key, 2)) for key in keys]))


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_mask_equals_eager(backend, fresh_dynamo):
    x = torch.ones(2, 3, 32)
    run = torch.compile(
        lambda x, key: dropout(x, 0.3, fold(key, 5)), fullgraph=True, backend=backend
    )
    for seed in (0, -1, 2**40 + 17):
        key = torch.tensor(seed)
        assert torch.equal(run(x, key), dropout(x, 0.3, fold(key, 5)))


def test_a_part_of_the_rows_has_its_part_of_the_mask():
    x, key = torch.ones(12, 40), fold(torch.tensor(2**40 + 3), 1)
    batch = dropout(x, 0.3, key)
    for number in (0, 5, 11):
        row = torch.tensor(number)
        assert torch.equal(dropout(x[number:], 0.3, key, row), batch[number:])
        again = key_and_row(from_row(key, row))
        assert torch.equal(again[0], key) and torch.equal(again[1], row)
    late = dropout(x, 0.3, key, torch.tensor(2**31 - 20))  # no number overflows
    assert (late == 0).float().mean() > 0.2
    assert from_row(key, None) is key and key_and_row(key)[1] == 0
