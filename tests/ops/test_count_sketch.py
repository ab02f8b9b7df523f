"""Count sketches: linear, and their inner products are unbiased with the known variance."""

import torch

from fastlora.ops.count_sketch import count_sketch
from fastlora.ops.dropout import fold


def key(seed: int) -> torch.Tensor:
    return fold(torch.tensor(seed), 0)


def test_every_element_is_in_one_bucket_with_one_sign():
    """The sketches of the unit vectors are the sketch's matrix, and it is linear."""
    p, k = 37, 8
    matrix = count_sketch(torch.eye(p, dtype=torch.float64), key(3), k)
    assert torch.equal(matrix.abs().sum(1), torch.ones(p, dtype=torch.float64))
    x = torch.randn(5, p, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(count_sketch(x, key(3), k), x @ matrix)
    buckets = matrix.abs().argmax(1)
    for block in range(0, p, k):  # elements of a block never meet
        assert len(buckets[block : block + k].unique()) == len(buckets[block : block + k])
    assert not torch.equal(matrix, count_sketch(torch.eye(p, dtype=torch.float64), key(4), k))


def test_inner_products_are_without_bias_and_their_variance_is_that_of_a_count_sketch():
    """Over 400 seeds: the mean within 4 standard errors, the variance at most
    (|x|^2 |y|^2 + (x y)^2) / k, with a quarter of it for chance."""
    g = torch.Generator().manual_seed(1)
    # Positive elements: unfair signs would add a bias, which random signs of x would hide.
    x, y = torch.randn(2, 1, 600, generator=g, dtype=torch.float64).abs()
    k, true = 64, (x * y).sum()
    both = torch.cat([x, y])
    sketches = torch.stack([count_sketch(both, key(seed), k) for seed in range(400)])
    estimates = (sketches[:, 0] * sketches[:, 1]).sum(1)
    assert (estimates.mean() - true).abs() < 4 * estimates.std() / 20
    bound = (x.square().sum() * y.square().sum() + true**2) / k
    assert 0.5 * bound < estimates.var() < 1.25 * bound


def test_more_buckets_than_elements_keep_every_inner_product():
    x = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine = count_sketch(x, key(5), 64)
    torch.testing.assert_close(mine @ mine.t(), x @ x.t())
