"""The objectives of train(loss=...): their sums, gradients and reference, and refused settings."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora import losses
from fastlora.losses.loss_argument import objective_of
from fastlora.model import Model
from oracles import losses as papers
from oracles.preference_data import LABELLED, PAIRS
from oracles.trees import randomised, relative_error

NAMES = ("dpo", "orpo", "simpo", "kto")


@pytest.fixture(scope="session")
def pairs(tokenizer) -> dict[str, Tensor]:
    encoded = losses.encode_pairs(PAIRS[:4], tokenizer, max_seq_length=64)
    return next(losses.preference_batches(encoded, 4, seed=None))


@pytest.fixture(scope="session")
def labelled(tokenizer) -> dict[str, Tensor]:
    encoded = losses.encode_labelled(LABELLED[:5], tokenizer, max_seq_length=64)
    return next(losses.preference_batches(encoded, 5, seed=None))


def row_sums(model: Model, adapter: Any, batch: dict[str, Tensor], prefix: str = "") -> Any:
    """(sum of log p, number of tokens) of each row, from whole logits."""
    ids, labels, mask = (batch[prefix + name] for name in ("input_ids", "labels", "attention_mask"))
    logits = FL.forward(adapter, model.base, model.spec, ids, attention_mask=mask)
    logp = logits[:, :-1].double().log_softmax(-1)
    picked = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    trained = labels[:, 1:] != -100
    return (picked * trained).sum(1), trained.sum(1)


def expected(name: str, model: Model, reference: Any, batch: dict[str, Tensor], adapter: Any):
    """The paper's loss of each row, from whole logits."""
    sums, tokens = row_sums(model, adapter, batch)
    half = len(sums) // 2
    means = sums / tokens
    if name == "orpo":
        return papers.orpo(means[:half], means[half:], beta=0.1)
    if name == "simpo":
        return papers.simpo(means[:half], means[half:], beta=0.1, simpo_gamma=0.5)
    with torch.no_grad():
        ref, _ = row_sums(model, reference, batch)
    if name == "dpo":
        return papers.dpo(sums[:half], sums[half:], ref[:half], ref[half:], beta=0.1)
    with torch.no_grad():
        other, ref_other = (row_sums(model, a, batch, "KL_")[0] for a in (adapter, reference))
    weights = dict(desirable_weight=1.0, undesirable_weight=1.0, beta=0.1)
    return papers.kto(sums, ref, batch["label"], KL_logps=other, ref_KL_logps=ref_other, **weights)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["float64", "nf4"])
def test_sum_and_gradient_are_those_of_the_papers_from_whole_logits(
    name, kind, model, quantised, pairs, labelled
):
    model, tolerance = (model, 1e-8) if kind == "float64" else (quantised, 1e-5)
    batch = labelled if name == "kto" else pairs
    objective = objective_of(name, model)
    assert objective is not None
    policy = randomised(model.adapter, seed=5)
    ours = lambda a: objective.loss_sum(a, model.base, model.spec, batch, None)
    value, grads = fastlora.value_and_grad(ours)(policy)
    theirs = lambda a: expected(name, model, model.adapter, batch, a).sum()
    wanted, wanted_grads = fastlora.value_and_grad(theirs)(policy)
    torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance)
    assert relative_error(grads, wanted_grads) < 100 * tolerance
    assert objective.count(batch) == len(expected(name, model, model.adapter, batch, policy))


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_is_the_start_the_base_or_another_model(name, model, pairs, labelled):
    batch = labelled if name == "kto" else pairs
    kind = {"dpo": losses.DPO, "kto": losses.KTO}[name]
    policy = randomised(model.adapter, seed=5)
    other = model.with_adapter(randomised(model.adapter, seed=6))
    for reference, adapter in (("start", model.adapter), (None, None), (other, other.adapter)):
        objective = kind(reference=reference).started_from(model)
        loss = objective.loss_sum(policy, model.base, model.spec, batch, None)
        wanted = expected(name, model, adapter, batch, policy).sum()
        torch.testing.assert_close(loss, wanted, rtol=1e-8, atol=1e-8)


def test_the_reference_shares_the_base(model):
    objective = losses.DPO().started_from(model)
    assert isinstance(objective, losses.DPO) and isinstance(objective.reference, Model)
    assert objective.reference.base is model.base
    assert objective.reference.adapter is model.adapter


@pytest.mark.parametrize("name", ["dpo", "kto"])
@pytest.mark.parametrize("reference", ["start", None, "another adapter"])
def test_the_reference_takes_no_memory(name, reference, model, pairs, labelled):
    """Beside the policy's forward pass, autograd keeps only some values of each row."""
    batch = labelled if name == "kto" else pairs
    other = model.with_adapter(randomised(model.adapter, seed=6))
    kind = {"dpo": losses.DPO, "kto": losses.KTO}[name]
    chosen = other if reference == "another adapter" else reference
    objective = kind(reference=chosen).started_from(model)
    kept = {id(x) for x in (*tree_leaves(model), *tree_leaves(other))}

    def saved_bytes(fn: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if id(x) not in kept:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = fn(tree_map(lambda x: x.detach().requires_grad_(), model.adapter))
        assert value.requires_grad
        return sum(sizes.values())

    rows = {k: batch[k] for k in ("input_ids", "labels", "attention_mask")}
    args = (model.base, model.spec)
    alone = saved_bytes(lambda a: losses.row_logprobs(a, *args, rows)[0].sum())
    loss = saved_bytes(lambda a: objective.loss_sum(a, *args, batch, None))
    assert alone > 10_000
    assert loss <= alone + 200 * len(rows["input_ids"])


def test_a_policy_equal_to_its_reference_has_dpo_log_2(model, pairs):
    objective = losses.DPO().started_from(model)
    loss = objective.loss_sum(model.adapter, model.base, model.spec, pairs, None)
    torch.testing.assert_close(loss, 4 * torch.tensor(2.0, dtype=loss.dtype).log())


def test_ipo_uses_means_over_tokens(model, pairs):
    policy = randomised(model.adapter, seed=5)
    objective = losses.DPO(loss_type="ipo").started_from(model)
    (sums, n), (ref, _) = row_sums(model, policy, pairs), row_sums(model, model.adapter, pairs)
    halves = [*(sums / n).chunk(2), *(ref / n).chunk(2)]
    wanted = papers.dpo(*halves, beta=0.1, loss_type="ipo").sum()
    loss = objective.loss_sum(policy, model.base, model.spec, pairs, None)
    torch.testing.assert_close(loss, wanted, rtol=1e-8, atol=1e-8)


def test_cpo_alpha_adds_the_supervised_loss(model, pairs):
    args = (model.adapter, model.base, model.spec, pairs, None)
    sums, n = row_sums(model, model.adapter, pairs)
    added = losses.SimPO(cpo_alpha=0.5).loss_sum(*args) - losses.SimPO().loss_sum(*args)
    torch.testing.assert_close(added, -0.5 * (sums / n)[:4].sum())


def test_dft_and_distill_are_sums_over_trained_tokens(model, pairs):
    args = (model.adapter, model.base, model.spec, pairs)
    logp = FL.token_logprobs(
        *args[:3], pairs["input_ids"], pairs["labels"], attention_mask=pairs["attention_mask"]
    )
    torch.testing.assert_close(losses.DFT().loss_sum(*args, None), papers.dft(logp).sum())
    assert losses.DFT().count(pairs) == (pairs["labels"][:, 1:] != -100).sum()
    teacher = model.with_adapter(randomised(model.adapter, seed=8))
    ours = losses.Distill(teacher=teacher, beta=1.0).loss_sum(*args, None)
    assert ours == losses.distill(*args, teacher, beta=1.0)[0]


def test_row_logprobs_are_sums_of_token_logprobs(model, pairs):
    sums, tokens = losses.row_logprobs(model.adapter, model.base, model.spec, pairs)
    wanted, n = row_sums(model, model.adapter, pairs)
    torch.testing.assert_close(sums, wanted)
    assert torch.equal(tokens, n)


def test_dropout_is_the_policys_alone(model, pairs):
    """The reference has none, and the same seed gives the same masks."""
    lora = dataclasses.replace(model.spec.lora, lora_dropout=0.5)
    spec = dataclasses.replace(model.spec, lora=lora)
    objective = losses.DPO().started_from(dataclasses.replace(model, spec=spec))
    loss = lambda seed: objective.loss_sum(model.adapter, model.base, spec, pairs, seed)
    assert torch.equal(loss(3), loss(3))
    assert not torch.equal(loss(3), loss(4))
    assert isinstance(objective, losses.DPO)
    ref, _ = objective.reference_logprobs(model.base, spec, pairs)
    torch.testing.assert_close(ref, row_sums(model, model.adapter, pairs)[0])


def test_the_base_under_a_pissa_adapter_is_the_checkpoints(base, pairs):
    """PiSSA subtracts its start from the base; a reference without adapter must not."""
    model = fastlora.lora(base, r=2, init_lora_weights="pissa")
    ref, _ = losses.DPO(reference=None).reference_logprobs(model.base, model.spec, pairs)
    wanted, _ = losses.row_logprobs(None, base.base, base.spec, pairs)
    torch.testing.assert_close(ref, wanted)


def test_an_objective_differentiates_under_torch_func(model, pairs):
    objective = losses.DPO(reference=None)
    fn = lambda a: objective.loss_sum(a, model.base, model.spec, pairs, None)
    _, grads = fastlora.value_and_grad(fn)(model.adapter)
    assert relative_error(torch.func.grad(fn)(model.adapter), grads) < 1e-8


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (losses.DPO, dict(beta=0.0), "losses.DPO.*\n.*beta=0.0"),
        (losses.DPO, dict(loss_type="kto"), "loss_type='kto'"),
        (losses.DPO, dict(loss_type="ipo", label_smoothing=0.1), "loss_type='ipo' has none"),
        (losses.KTO, dict(desirable_weight=-1.0), "desirable_weight"),
        (losses.SimPO, dict(cpo_alpha=-1.0), "cpo_alpha"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


def test_a_reference_that_is_not_bound_is_refused(model, pairs):
    with pytest.raises(ValueError, match="started_from"):
        losses.DPO().loss_sum(model.adapter, model.base, model.spec, pairs, None)


def test_zero_adapters_are_no_reference_cost(model, pairs):
    """B = 0 is the base: a fresh adapter as reference gives the base's log-probabilities."""
    zero = model.with_adapter(tree_map(torch.zeros_like, model.adapter))
    args = (model.adapter, model.base, model.spec, pairs, None)
    start = losses.DPO().started_from(zero).loss_sum(*args)
    torch.testing.assert_close(start, losses.DPO(reference=None).loss_sum(*args))
