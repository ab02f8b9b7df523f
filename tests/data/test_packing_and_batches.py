"""pack() and batches(): whole documents, and an order that the seed decides."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlora.data.batches import batches, count_batches, count_trained_tokens
from fastlora.data.examples import Example, Packed
from fastlora.data.packing import pack
from fastlora.ops.loss.linear_cross_entropy import IGNORE as IGNORED


def documents(lengths: list[int]) -> list[Example]:
    """Examples whose tokens are all different; all but the first of each are trained."""
    ends = np.cumsum([0, *lengths])
    ids = [np.arange(a, b) + 1000 for a, b in itertools.pairwise(ends)]
    return [Example(i, np.where(np.arange(len(i)) > 0, i, IGNORED)) for i in ids]


lengths = st.lists(st.integers(1, 16), min_size=1, max_size=40)


@given(lengths)
def test_packing_keeps_every_document_in_one_piece_and_separate(lengths):
    examples = documents(lengths)
    packed = pack(examples, 16, pad_token_id=7)
    found = []
    for sequence in packed:
        assert len(sequence.input_ids) == len(sequence.labels) == len(sequence.segment_ids) == 16
        last = sequence.segment_ids.max()
        real = sequence.segment_ids > 0
        assert sequence.segment_ids[real].tolist() == sorted(sequence.segment_ids[real].tolist())
        assert not real.any() or np.flatnonzero(real)[-1] == real.sum() - 1  # padding is last
        assert (sequence.labels[~real] == IGNORED).all() and (sequence.input_ids[~real] == 7).all()
        for segment in range(1, last + 1):
            at = sequence.segment_ids == segment
            assert sequence.labels[at][0] == IGNORED
            found.append((sequence.input_ids[at].tolist(), sequence.labels[at].tolist()))
    expected = [(e.input_ids.tolist(), e.labels.tolist()) for e in examples]
    assert sorted(found) == sorted(expected)
    least = -(-sum(lengths) // 16)
    assert len(packed) <= 11 / 9 * least * 1.5 + 1


@given(lengths)
def test_packing_depends_on_its_input_only(lengths):
    as_lists = lambda packed: [p.input_ids.tolist() for p in packed]
    assert as_lists(pack(documents(lengths), 16)) == as_lists(pack(documents(lengths), 16))


def test_packing_fills_what_fits_exactly():
    packed = pack(documents([5, 11, 9, 7, 16, 8, 4, 4]), 16)
    assert len(packed) == 4 and all((p.segment_ids > 0).all() for p in packed)


def test_the_first_token_of_a_packed_document_is_never_a_target():
    example = Example(np.arange(4), np.arange(4))
    (packed,) = pack([example, example], 8)
    assert packed.labels.tolist() == [IGNORED, 1, 2, 3, IGNORED, 1, 2, 3]
    assert example.labels.tolist() == [0, 1, 2, 3]


def test_documents_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="example 2: 17 tokens"):
        pack(documents([3, 17]), 16)


def as_lists(stream) -> list[dict]:
    return [{name: tensor.tolist() for name, tensor in batch.items()} for batch in stream]


@given(lengths, st.integers(1, 5), st.integers(0, 3), st.integers(0, 2))
def test_batches_hold_every_example_once_in_an_order_of_seed_and_epoch(lengths, size, seed, epoch):
    examples = documents(lengths)
    whole = list(batches(examples, size, seed=seed, epoch=epoch, pad_token_id=3))
    assert len(whole) == count_batches(examples, size) == -(-len(examples) // size)
    rows = []
    for batch in whole:
        assert set(batch) == {"input_ids", "labels", "attention_mask"}
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        assert batch["input_ids"].shape[1] % 8 == 0
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 3).all()
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # padding on the right
            rows.append(ids[mask == 1].tolist())
    assert sorted(rows) == sorted(e.input_ids.tolist() for e in examples)
    assert as_lists(batches(examples, size, seed=seed, epoch=epoch, pad_token_id=3)) == as_lists(
        whole
    )
    trained = sum(len(e.input_ids) - 1 for e in examples)
    assert sum(map(count_trained_tokens, whole)) == trained


@given(lengths, st.integers(1, 5), st.integers(0, 9))
def test_an_epoch_restarts_at_any_batch(lengths, size, start):
    examples = documents(lengths)
    whole = as_lists(batches(examples, size, seed=1, epoch=2))
    assert as_lists(batches(examples, size, seed=1, epoch=2, start=start)) == whole[start:]


def test_epochs_and_seeds_differ_and_no_seed_keeps_the_order():
    examples = documents([1] * 50)
    order = lambda **how: next(batches(examples, 50, **how))["input_ids"][:, 0].tolist()
    orders = [order(seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(seed=None, epoch=3) == [e.input_ids[0] for e in examples]


def test_batches_leave_every_global_generator_alone():
    before = (torch.get_rng_state(), np.random.get_state()[1])
    list(batches(documents([3] * 9), 2, seed=5))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_packed_batches_have_one_shape():
    packed = pack(documents([3, 9, 16, 2, 2, 11]), 16)
    assert all(isinstance(sequence, Packed) for sequence in packed)
    for batch in batches(packed, 1, seed=0):
        assert {name: tensor.shape for name, tensor in batch.items()} == dict.fromkeys(
            ("input_ids", "labels", "segment_ids"), (1, 16)
        )


def test_padding_stays_within_the_longest_allowed_sequence():
    (batch,) = batches(documents([9, 10]), 2, seed=None, max_seq_length=11)
    assert batch["input_ids"].shape == (2, 11)
    (batch,) = batches(documents([9, 10]), 2, seed=None, max_seq_length=64)
    assert batch["input_ids"].shape == (2, 16)
    with pytest.raises(ValueError, match="batch_size=0"):
        next(batches(documents([1]), 0, seed=None))
