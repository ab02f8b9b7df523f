"""divergence and distill: values, gradients, and that whole logits are never held."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora import losses
from fastlora.losses import distillation
from fastlora.model import Model
from oracles import losses as papers
from oracles.batches import batch_of
from oracles.pairs import adapted
from oracles.trees import randomised, relative_error, token_ids

KINDS = {"forward": 0.0, "reverse": 1.0, "Jensen-Shannon": 0.3}


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(6, 11, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", KINDS.values(), ids=KINDS)
def test_divergence_is_the_papers(beta, temperature):
    results = []
    settings: dict[str, Any] = dict(beta=beta, temperature=temperature)
    for fn, dtype in ((losses.divergence, torch.float32), (papers.divergence, torch.float64)):
        student = logits(0).to(dtype).requires_grad_()
        value = fn(student, logits(1).to(dtype), **settings)
        results.append((value, *torch.autograd.grad(value.mean(), student)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", KINDS.values(), ids=KINDS)
def test_equal_models_have_divergence_zero(beta):
    assert losses.divergence(logits(0), logits(0), beta=beta).abs().max() < 1e-6


def teacher_of(model: Model) -> Model:
    return model.with_adapter(randomised(model.adapter, seed=9))


def whole(adapter: Any, model: Model, batch: dict[str, Tensor], teacher: Model, **s: Any) -> Tensor:
    """The same loss from whole logits."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    student = FL.forward(adapter, model.base, model.spec, **inputs)
    other = FL.forward(teacher.adapter, teacher.base, teacher.spec, **inputs)
    trained = FL.trained_labels(batch)[:, 1:] != -100
    each = papers.divergence(student[:, :-1][trained], other[:, :-1][trained], **s)
    return each.sum()


def batch_with(kind: str) -> dict[str, Tensor]:
    batch = batch_of(2, 9)
    if kind == "padded":
        batch["attention_mask"] = (torch.arange(9) < torch.tensor([[9], [5]])).long()
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    if kind == "packed":
        batch["segment_ids"] = torch.tensor([[1] * 4 + [2] * 5, [1] * 9])
    return batch


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize("beta", KINDS.values(), ids=KINDS)
def test_distill_equals_the_divergence_of_whole_logits(tiny, beta, kind, monkeypatch):
    monkeypatch.setattr(distillation, "rows_per_chunk", lambda v: 4)  # 18 rows: 5 chunks
    teacher, batch = teacher_of(tiny), batch_with(kind)
    settings: dict[str, Any] = dict(beta=beta, temperature=1.7)

    def ours(adapter: Any) -> Tensor:
        return losses.distill(adapter, tiny.base, tiny.spec, batch, teacher, **settings)[0]

    value, grads = fastlora.value_and_grad(ours)(tiny.adapter)
    theirs = lambda adapter: whole(adapter, tiny, batch, teacher, **settings)
    expected, expected_grads = fastlora.value_and_grad(theirs)(tiny.adapter)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    assert relative_error(grads, expected_grads) < 1e-8
    transformed = torch.func.grad(ours)(tiny.adapter)
    assert relative_error(transformed, expected_grads) < 1e-8
    _, tokens = losses.distill(tiny.adapter, tiny.base, tiny.spec, batch, teacher)
    assert tokens == (FL.trained_labels(batch)[:, 1:] != -100).sum()


def test_a_trained_head_gets_its_gradient(tiny, monkeypatch):
    monkeypatch.setattr(distillation, "rows_per_chunk", lambda v: 4)
    model = adapted(tiny.with_adapter(None), r=2, modules_to_save=["lm_head"])
    teacher, batch = tiny, batch_of(2, 9)
    args = (model.base, model.spec, batch, teacher)
    _, grads = fastlora.value_and_grad(lambda a: losses.distill(a, *args)[0])(model.adapter)
    theirs = lambda a: whole(a, model, batch, teacher, beta=0.5, temperature=1.0)
    _, expected = fastlora.value_and_grad(theirs)(model.adapter)
    assert relative_error(grads, expected) < 1e-8


def test_the_base_can_be_the_teacher(tiny):
    batch = batch_of(2, 9)
    same = tiny.with_adapter(None)
    zero = tree_map(torch.zeros_like, tiny.adapter)
    loss, _ = losses.distill(zero, tiny.base, tiny.spec, batch, same)
    assert loss.abs() < 1e-9
    loss, _ = losses.distill(tiny.adapter, tiny.base, tiny.spec, batch, same)
    assert loss > 1e-3


class LiveLogits(TorchDispatchMode):
    """The largest tensor [..., v] of both passes, and the most elements of such tensors that were
    in memory at a time."""

    def __init__(self, v: int, parameters: Any) -> None:
        """Views of `parameters`, such as the head's, are not counted."""
        super().__init__()
        self.v, self.largest, self.most = v, 0, 0
        self._live: dict[int, int] = {}  # storage -> elements
        self._known = {x.untyped_storage().data_ptr() for x in tree_leaves(parameters)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] == self.v:
                storage = x.untyped_storage()
                if storage.data_ptr() in self._known:
                    continue
                self.largest = max(self.largest, x.numel())
                if storage._cdata not in self._live:
                    self._live[storage._cdata] = x.numel()
                    weakref.finalize(storage, self._live.pop, storage._cdata, None)
                self.most = max(self.most, sum(self._live.values()))
        return result


@pytest.mark.parametrize("beta", KINDS.values(), ids=KINDS)
def test_only_one_chunk_of_logits_is_held(tiny, beta, monkeypatch):
    rows, v = 4, tiny.spec.config.vocab_size
    monkeypatch.setattr(distillation, "rows_per_chunk", lambda v: rows)
    teacher = teacher_of(tiny)
    most = []
    for t in (32, 128):
        ids = token_ids(1, t)
        batch = {"input_ids": ids, "labels": ids}
        loss = lambda a, batch=batch: losses.distill(
            a, tiny.base, tiny.spec, batch, teacher, beta=beta
        )[0]
        with LiveLogits(v, (tiny.base, tiny.adapter)) as logits:
            fastlora.value_and_grad(loss)(tiny.adapter)
        assert logits.largest == rows * v
        most.append(logits.most)
    assert most[0] == most[1], "the peak depends on the number of tokens"
    assert most[0] <= 12 * rows * v


def test_a_teacher_may_have_another_base(tiny, shallow):
    """One layer instead of two, and another head."""
    batch = batch_of(2, 9)
    ours = lambda a: losses.distill(a, tiny.base, tiny.spec, batch, shallow, beta=0.0)[0]
    value, grads = fastlora.value_and_grad(ours)(tiny.adapter)
    theirs = lambda a: whole(a, tiny, batch, shallow, beta=0.0, temperature=1.0)
    expected, expected_grads = fastlora.value_and_grad(theirs)(tiny.adapter)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    assert relative_error(grads, expected_grads) < 1e-8


def test_wrong_arguments_are_refused_by_name(tiny):
    batch, teacher = batch_of(2, 9), teacher_of(tiny)
    call = lambda **s: losses.distill(tiny.adapter, tiny.base, tiny.spec, batch, teacher, **s)
    for name, value in (("beta", 1.5), ("temperature", 0.0), ("seed", -1)):
        with pytest.raises(ValueError, match=name):
            call(**{name: value})
    config = dataclasses.replace(tiny.spec.config, vocab_size=25)
    larger = dataclasses.replace(teacher, spec=dataclasses.replace(tiny.spec, config=config))
    with pytest.raises(ValueError, match="25 ids"):
        losses.distill(tiny.adapter, tiny.base, tiny.spec, batch, larger)
