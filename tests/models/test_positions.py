"""Positions, masks and RoPE tables, each against its definition or transformers."""

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastlora.models.positions import attention_mask_2d, positions, segment_starts, sequence_lengths
from fastlora.models.rope_tables import layer_rope, rope_frequencies, rope_tables
from oracles.checkpoints import FAMILIES
from oracles.trees import token_ids

CPU = torch.device("cpu")
SEGMENTS = torch.tensor([[4, 4, 4, 0, 0, 4, 4], [1, 2, 3, 3, 3, 3, 3]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def brute_force(t, window, mask, segments):
    """The definition of the mask, one pair of query and key at a time."""
    b = 2
    allowed = torch.zeros(b, 1, t, t, dtype=torch.bool)
    for row in range(b):
        run = segment_starts(segments)[row].cumsum(0) if segments is not None else torch.zeros(t)
        for i in range(t):
            for j in range(i + 1):
                sees = window is None or i - j < window
                sees &= bool(run[i] == run[j])
                sees &= mask is None or bool(mask[row, j])
                allowed[row, 0, i, j] = sees or i == j
    return allowed


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("mask", [None, LEFT, LEFT.flip(-1)], ids=["none", "left", "right"])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one", "packed"])
def test_masks_are_their_definition(window, mask, segments):
    ours = attention_mask_2d(7, window, mask, segments, CPU)
    expected = brute_force(7, window, mask, segments)
    if ours is None:
        ours = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    assert torch.equal(ours.expand_as(expected), expected)
    assert ours.any(-1).all()  # no softmax row is empty


def test_plain_causal_attention_needs_no_mask():
    assert attention_mask_2d(7, None, None, None, CPU) is None
    assert attention_mask_2d(7, 7, None, None, CPU) is None


def test_positions_restart_with_each_run_of_segment_ids():
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 4]]
    assert positions(SEGMENTS, None, SEGMENTS).tolist() == expected


def test_positions_count_real_tokens():
    expected = [[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
    assert positions(LEFT, LEFT, None).tolist() == expected
    assert positions(LEFT, None, None).tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_right_padding_after_packed_documents_changes_no_position():
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * 2)
    assert positions(SEGMENTS, mask, SEGMENTS)[:, :5].tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]]


def test_sequence_lengths_are_those_of_rows_or_documents():
    assert sequence_lengths(torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]]), None).tolist() == [[3], [4]]
    lengths = sequence_lengths(positions(SEGMENTS, None, SEGMENTS), SEGMENTS)
    assert lengths.tolist() == [[3, 3, 3, 2, 2, 2, 2], [1, 1, 5, 5, 5, 5, 5]]


@pytest.mark.parametrize("t", [7, 16, 17, 24, 100])
@pytest.mark.parametrize("family", [f for f in FAMILIES if "rope_parameters" in FAMILIES[f]])
def test_frequencies_equal_transformers(family, t, pair):
    one = pair(family)
    config, rotary = one.model.spec.config, one.oracle.model.rotary_emb
    apart = config.sliding_rope_parameters is not None
    for layer_type in sorted(set(config.layer_types)):
        rope = layer_rope(config, layer_type)
        ours, factor = rope_frequencies(config, torch.tensor([[t]]), torch.float32, rope)
        prefix, how = (f"{layer_type}_", {"layer_type": layer_type}) if apart else ("", {})
        if rope.rope_type == "default":
            expected = getattr(rotary, f"{prefix}inv_freq")
            expected_factor = getattr(rotary, f"{prefix}attention_scaling")
        else:
            compute = ROPE_INIT_FUNCTIONS[rope.rope_type]
            expected, expected_factor = compute(one.oracle.config, CPU, seq_len=t, **how)
        torch.testing.assert_close(ours.flatten(), expected, rtol=1e-6, atol=0)
        assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_tables_are_computed_in_float32_and_rounded_once(pair):
    """bfloat16 angles at position 1000 would be off by 4 radians."""
    config = pair("llama2").model.spec.config
    ids, lengths = torch.tensor([[0, 1, 127, 1000]]), torch.tensor([[1001]])
    exact = rope_tables(config, ids, lengths, torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2**-8)):
        for table, reference in zip(rope_tables(config, ids, lengths, dtype), exact, strict=True):
            assert table.dtype == dtype
            torch.testing.assert_close(table.double(), reference, rtol=0, atol=tolerance)


def test_with_dynamic_rope_a_row_does_not_depend_on_other_rows(pair):
    model = pair("dynamic").model
    long, short = token_ids(1, 24, vocab_size=96), token_ids(1, 24, seed=1, vocab_size=96)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 5:] = 0
    together = model(torch.cat((long, short)), attention_mask=mask)
    torch.testing.assert_close(together[1, :5], model(short[:, :5])[0], rtol=0, atol=1e-5)
