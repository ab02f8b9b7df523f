"""mix(): shares of sources."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastlora.data.examples import Example, make_example
from fastlora.data.mixing import mix, quotas


def part(source: int, n: int) -> list[Example]:
    return [make_example([source, i], [True, True]) for i in range(n)]


def counted(examples: list[Example]) -> Counter:
    return Counter(tuple(example.input_ids.tolist()) for example in examples)


sizes_and_weights = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0.01, 100)), min_size=1, max_size=5
)


@given(sizes_and_weights, st.integers(0, 9))
def test_every_source_has_its_share_and_repeats_evenly(given_parts, seed):
    parts = [part(i, n) for i, (n, _) in enumerate(given_parts)]
    weights = [w for _, w in given_parts]
    mixed = mix(parts, weights, seed=seed)
    total = sum(map(len, parts))
    assert len(mixed) == total == sum(quotas(parts, weights))
    for i, weight in enumerate(weights):
        times = [n for (source, _), n in counted(mixed).items() if source == i]
        assert abs(sum(times) - weight / sum(weights) * total) < 1
        times += [0] * (len(parts[i]) - len(times))
        assert max(times) - min(times) <= 1
    assert counted(mixed) == counted(mix(parts, weights, seed=seed))


def test_the_seed_chooses_the_sample():
    parts = [part(0, 100), part(1, 100)]
    chosen = [counted(mix(parts, [1, 3], seed=seed)) for seed in (0, 1)]
    assert chosen[0] != chosen[1]


def test_weights_are_relative():
    parts = [part(0, 30), part(1, 10)]
    assert quotas(parts, [3, 1]) == quotas(parts, [0.3, 0.1]) == [30, 10]
    assert counted(mix(parts, [3, 1], seed=0)) == counted([*parts[0], *parts[1]])


def test_repeated_examples_share_their_memory():
    (one,) = part(0, 1)
    mixed = mix([[one], part(1, 9)], [1, 1], seed=0)
    assert sum(example is one for example in mixed) == 5
    assert np.shares_memory(mixed[0].input_ids, mixed[1].input_ids)


def test_the_first_of_equal_remainders_gets_one_more():
    assert quotas([part(0, 2), part(1, 1), part(2, 1)], [1, 1, 1]) == [2, 1, 1]
