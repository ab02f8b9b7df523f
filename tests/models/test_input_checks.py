"""Wrong arguments of functional.* and value_and_grad are refused by name, before any work."""

import time
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import fastlora
from fastlora import functional as FL
from fastlora.arguments import argument_problems
from fastlora.models.input_checks import MODEL, batches_problems
from oracles.trees import token_ids


class Stranger:
    """An object of a class that no function accepts."""


IDS = token_ids(2, 6)
OTHER = (None, (1, 2), "text", 1.5, [1, 2], Stranger())
NOT_IDS = (*OTHER, IDS.float(), IDS.int(), IDS[0], IDS[:, :0], IDS + 0j)
NOT_BESIDE = (*OTHER[1:], IDS.float(), IDS[:, :3], IDS[0], IDS[None])
TREES = {
    "adapter": (*OTHER[1:], {}, {"layers": ()}, torch.ones(2)),
    "base": (*OTHER, {}, {"layers": ()}, torch.ones(2)),
    "spec": (*OTHER, {}),
    "seed": (*OTHER[1:], True, torch.ones(2, dtype=torch.int64), torch.tensor(1.5)),
}
BESIDE = dict.fromkeys(("attention_mask", "position_ids", "segment_ids"), NOT_BESIDE)

# Function -> (names of its good tensors, argument -> wrong values).
CALLS: dict[str, tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]] = {
    "forward": (
        ("input_ids",),
        TREES
        | BESIDE
        | {"input_ids": NOT_IDS, "adapter_ids": (*OTHER[1:], IDS, IDS[:, 0].float(), IDS[0])},
    ),
    "token_logprobs": (
        ("input_ids", "labels"),
        TREES | BESIDE | {"input_ids": NOT_IDS, "labels": (None, *NOT_BESIDE)},
    ),
    "loss": (("batch",), TREES | {"batch": (*OTHER, IDS)}),
    "loss_sum": (("batch",), TREES | {"batch": (*OTHER, IDS)}),
}
CASES = [(f, name, i) for f, (_, w) in CALLS.items() for name in w for i in range(len(w[name]))]


def refuse_work(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the model ran")


@pytest.fixture
def arguments(tiny, monkeypatch):
    """arguments(function): good ones. Running the model fails the test."""
    monkeypatch.setattr("fastlora.models.outputs.hidden_states", refuse_work)
    good = dict(input_ids=IDS, labels=IDS, batch={"input_ids": IDS, "labels": IDS})

    def of(function: str) -> dict[str, Any]:
        trees = dict(adapter=tiny.adapter, base=tiny.base, spec=tiny.spec)
        return trees | {name: good[name] for name in CALLS[function][0]}

    return of


@pytest.mark.parametrize(("function", "name", "number"), CASES)
def test_a_wrong_argument_is_named_at_once(function, name, number, arguments):
    wrong = CALLS[function][1][name][number]
    start = time.perf_counter()
    with pytest.raises((ValueError, TypeError), match=name):
        getattr(FL, function)(**arguments(function) | {name: wrong})
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention_masks": IDS}, "unknown entry 'attention_masks'"),
        ({"labels": IDS[:, :3]}, r"labels must be an integer tensor \[2, 6\], got .* \[2, 3\]"),
        ({"labels": IDS.float()}, r"labels must be .* got a tensor \[2, 6\] torch.float32"),
        ({"input_ids": IDS.int()}, "input_ids must be a non-empty int64 tensor"),
    ],
)
@pytest.mark.parametrize("function", ["loss", "loss_sum"])
def test_a_wrong_entry_of_a_batch_is_named(function, changed, message, arguments):
    batch = {"input_ids": IDS, "labels": IDS} | changed
    with pytest.raises(ValueError, match=message):
        getattr(FL, function)(**arguments(function) | {"batch": batch})


@pytest.mark.parametrize("missing", ["input_ids", "labels"])
@pytest.mark.parametrize("function", ["loss", "loss_sum"])
def test_a_missing_entry_of_a_batch_is_named(function, missing, arguments):
    batch = {name: IDS for name in ("input_ids", "labels") if name != missing}
    with pytest.raises(ValueError, match=f"missing {missing}"):
        getattr(FL, function)(**arguments(function) | {"batch": batch})


def test_trees_of_another_depth_are_refused(tiny):
    adapter = {"layers": tiny.adapter["layers"][:1]}
    with pytest.raises(ValueError, match="adapter has 1 layers, but spec says 2"):
        FL.forward(adapter, tiny.base, tiny.spec, IDS)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (None, "spec.lora is None"),
        (dict(r=2, target_modules=["q_proj"]), "LoRA of rank 2 on k_proj, where .* nothing"),
        (dict(r=3), "LoRA of rank 2 on q_proj, where spec.lora says LoRA of rank 3"),
        (dict(r=2, use_dora=True), "where spec.lora says DoRA of rank 2"),
        (dict(r=2, modules_to_save=["lm_head"]), r"has \[\] beside .* says \['replaced'\]"),
    ],
    ids=str,
)
def test_an_adapter_of_another_spec_is_refused(settings, reason, tiny):
    base = fastlora.disable(tiny)
    spec = base.spec if settings is None else fastlora.lora(base, **settings).spec
    batch = {"input_ids": IDS, "labels": IDS}
    loss = lambda adapter: FL.loss(adapter, base.base, spec, batch)
    rows = lambda adapter: FL.row_losses(adapter, base.base, spec, batch)[0]
    for call in (
        loss,
        torch.func.grad(loss),
        fastlora.value_and_grad(rows, per_example=True),
        lambda adapter: loss(tree_map(lambda x: x[None], adapter)),
    ):
        with pytest.raises(ValueError, match=reason):
            call(tiny.adapter)


def test_a_stack_needs_an_adapter(tiny):
    with pytest.raises(ValueError, match="adapter_ids is given, but adapter is None"):
        FL.forward(None, tiny.base, tiny.spec, IDS, adapter_ids=IDS[:, 0])


def test_values_are_not_looked_at(tiny, monkeypatch):
    """functional.* must not wait for the GPU: bool() of a tensor would."""
    monkeypatch.setattr(torch.Tensor, "__bool__", refuse_work)
    monkeypatch.setattr(torch.Tensor, "item", refuse_work)
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}
    FL.loss(tiny.adapter, tiny.base, tiny.spec, batch, seed=torch.tensor(3))


@pytest.mark.parametrize("name", ["fn", "cuda_graph"])
@pytest.mark.parametrize("wrong", OTHER, ids=lambda x: type(x).__name__)
def test_value_and_grad_names_a_wrong_argument(name, wrong):
    good: dict[str, Any] = dict(fn=lambda x: x.sum(), cuda_graph=False)
    with pytest.raises((ValueError, TypeError), match=name):
        fastlora.value_and_grad(**good | {name: wrong})


def test_the_pair_that_load_returns_gets_the_cure(tiny):
    (problem,) = argument_problems({"model": ((tiny, "tokenizer"), MODEL)})
    assert problem.startswith("model=a tuple of (Model, str): expected a fastlora.Model")
    assert "model, tokenizer = fastlora.load(...)" in problem
    assert not argument_problems({"model": (tiny, MODEL)})


def test_batches_of_data_are_checked_as_the_loss_checks_one(tiny):
    ids = {"input_ids": IDS}
    wrong = [None, {}, ids | {"attention_mask": 2 * torch.ones_like(IDS)}, {"input_ids": IDS + 24}]
    problems = batches_problems(tiny.spec, wrong, ("input_ids",))
    for i, words in enumerate(("expected a dict", "missing", "attention_mask holds [2]", "holds")):
        assert problems[i].startswith(f"batches[{i}]: ") and words in problems[i]
    assert not batches_problems(tiny.spec, [ids], ("input_ids",))
    empty = ids | {"attention_mask": torch.zeros_like(IDS)}
    (problem,) = batches_problems(tiny.spec, [empty], ("input_ids",))
    assert problem == "batches[0]: attention_mask has no real token"


def test_autocast_to_another_dtype_is_refused_before_any_work(monkeypatch):
    model, tokenizer = fastlora.load("demo", max_seq_length=64, dtype="float32", device="cpu")
    adapted = fastlora.lora(model, r=2)
    args = (adapted.base, adapted.spec, IDS)
    calls = [
        lambda: adapted(IDS),
        lambda: FL.token_logprobs(adapted.adapter, *args, IDS),
        lambda: fastlora.value_and_grad(lambda a: FL.forward(a, *args).sum())(adapted.adapter),
        lambda: torch.func.grad(lambda a: FL.forward(a, *args).sum())(adapted.adapter),
        lambda: model.generate(IDS, max_new_tokens=1),
        lambda: fastlora.generate_many(adapted, [[1, 2]]),
        lambda: fastlora.train(adapted, tokenizer, [{"text": "a"}], max_steps=1),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS)  # every product of a base alone is cast
        monkeypatch.setattr("fastlora.models.outputs.hidden_states", refuse_work)
        for call in calls:
            with pytest.raises(ValueError, match=r'autocast to torch.bfloat16.*dtype="bfloat16"'):
                call()


def test_autocast_that_changes_no_dtype_is_accepted(tiny):
    bfloat16 = torch.utils._pytree.tree_map(torch.Tensor.bfloat16, tiny.base)
    with torch.autocast("cpu", torch.bfloat16):
        FL.forward(tiny.adapter, bfloat16, tiny.spec, IDS)
        with torch.autocast("cpu", enabled=False):
            FL.forward(tiny.adapter, tiny.base, tiny.spec, IDS)
