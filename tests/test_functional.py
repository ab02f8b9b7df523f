"""The functions of fastlora.functional: loss, log-probabilities, dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from fastlora import functional as FL
from oracles.batches import batch_of
from oracles.trees import token_ids


def log_softmax_of(logits: Tensor, labels: Tensor) -> Tensor:
    """token_logprobs, as its contract says, from whole logits."""
    logp = logits[:, :-1].log_softmax(-1)
    picked = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return F.pad(torch.where(labels[:, 1:] == -100, 0.0, picked), (1, 0))


@pytest.mark.parametrize("seed", [None, 3, torch.tensor(3)], ids=["no dropout", "int", "tensor"])
def test_token_logprobs_equal_log_softmax_of_the_logits(seed, tiny):
    batch = batch_of(2, 9)
    args = (tiny.adapter, tiny.base, tiny.spec)
    logp = FL.token_logprobs(*args, batch["input_ids"], batch["labels"], seed=seed)
    expected = log_softmax_of(FL.forward(*args, batch["input_ids"], seed=seed), batch["labels"])
    torch.testing.assert_close(logp, expected, rtol=1e-12, atol=1e-12)
    assert not logp[:, 0].any()
    assert not logp[batch["labels"] == -100].any()
    assert (logp[:, 1:][batch["labels"][:, 1:] != -100] < 0).all()


def test_the_loss_is_the_mean_over_trained_labels(tiny):
    batch = batch_of(2, 9)
    args = (tiny.adapter, tiny.base, tiny.spec)
    logp = FL.token_logprobs(*args, batch["input_ids"], batch["labels"])
    count = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(FL.loss(*args, batch), -logp.sum() / count)


def test_a_batch_without_targets_has_loss_zero(tiny):
    ids = token_ids(2, 5)
    for labels in (torch.full_like(ids, -100), F.pad(ids[:, :1], (0, 4), value=-100)):
        loss = FL.loss(tiny.adapter, tiny.base, tiny.spec, {"input_ids": ids, "labels": labels})
        assert loss.item() == 0.0


def test_a_packed_loss_is_the_documents_together(tiny):
    ids, lengths = token_ids(1, 12), [5, 1, 6]
    segments = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    args = (tiny.adapter, tiny.base, tiny.spec)
    ours = FL.loss(*args, {"input_ids": ids, "labels": ids, "segment_ids": segments})
    documents = [d for d in ids.split(lengths, dim=1)]
    sums = [FL.loss_sum(*args, {"input_ids": d, "labels": d}) for d in documents]
    torch.testing.assert_close(ours, sum(s for s, _ in sums) / sum(n for _, n in sums))


def test_no_adapter_is_the_base_model(tiny, pair):
    ids = token_ids(2, 9)
    plain = tiny.with_adapter(None)
    with_none = FL.forward(None, tiny.base, tiny.spec, ids, seed=1)
    assert torch.equal(with_none, FL.forward(None, plain.base, plain.spec, ids))
    zero_b = tree_map(torch.zeros_like, tiny.adapter)
    torch.testing.assert_close(FL.forward(zero_b, tiny.base, tiny.spec, ids), with_none)
    assert not torch.equal(tiny(ids), with_none)


def test_dropout_needs_a_seed(tiny):
    ids = token_ids(2, 9)
    forward = lambda seed: FL.forward(tiny.adapter, tiny.base, tiny.spec, ids, seed=seed)
    assert torch.equal(forward(5), forward(torch.tensor(5)))
    assert torch.equal(forward(5), forward(5))
    assert not torch.equal(forward(5), forward(6))
    assert not torch.equal(forward(5), forward(5 + 2**32))
    assert not torch.equal(forward(5), forward(None))


def test_dropout_keeps_the_mean(tiny):
    """With an adapter so small that the logits are linear in its masks."""
    ids, small = token_ids(1, 4), tree_map(lambda x: 1e-3 * x, tiny.adapter)
    forward = lambda seed: FL.forward(small, tiny.base, tiny.spec, ids, seed=seed)
    drawn = vmap(forward)(torch.arange(400))
    # The mean of 400 draws is off by 1/20 of their spread; 0.8 of that on average.
    assert ((drawn.mean(0) - forward(None)).abs() / drawn.std(0)).mean() < 0.08
