"""Parity with transformers for every family: logits, padding, packing, loss."""

import pytest
import torch

from oracles.checkpoints import FAMILIES
from oracles.transformers_side import (
    LENGTHS,
    difference,
    losses,
    packed,
    padded,
    prompts,
    rounding,
    widened,
)
from oracles.trees import token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, pair):
    for t in LENGTHS:
        assert prompts(pair(family), t) <= 1e-5, f"{t} tokens"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_equal_transformers(family, side, pair):
    assert padded(pair(family), side) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_the_documents_alone(family, pair):
    assert packed(pair(family)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_equals_transformers(family, pair):
    assert losses(pair(family)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_errs_no_more_than_transformers(family, pair):
    rounded = pair(family, torch.bfloat16)
    exact = widened(rounded)
    for t in LENGTHS:
        ours, theirs = rounding(rounded, exact, t)
        assert ours <= 1.5 * theirs, f"{t} tokens: {ours:.1e} against {theirs:.1e}"


def test_given_positions_are_used(pair):
    one = pair("llama3.1")
    ids, positions = token_ids(2, 7, vocab_size=96), torch.tensor([[0, 2, 3, 5, 8, 9, 30]])
    theirs = one.theirs(ids, position_ids=positions.expand(2, 7))
    assert difference(one.model(ids, position_ids=positions), theirs) <= 1e-5
    assert difference(one.model(ids), theirs) > 1e-3
