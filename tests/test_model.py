"""Model: methods change nothing, bad input is refused before work, and PEFT's line is printed."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from peft import LoraConfig, get_peft_model
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from oracles.pairs import adapted
from oracles.trees import randomised, same_bits, token_ids

VOCAB = 96


@pytest.fixture
def model(pair):
    """llama2, 128 tokens long, with LoRA, dropout and a B that is not zero."""
    return adapted(pair("llama2").model, r=4, lora_dropout=0.1)


@pytest.fixture
def base(pair):
    return pair("llama2").model


def ids(b: int = 2, t: int = 6) -> torch.Tensor:
    return token_ids(b, t, vocab_size=VOCAB)


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": ids(), "labels": ids()}


# ── derived models ────────────────────────────────────────────────────────────────────────


def test_a_model_is_frozen(model):
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.adapter = None


def test_no_method_changes_its_receiver(model):
    before = [
        (x, x.clone(), x._version, x.requires_grad)
        for x in tree_leaves((model.base, model.adapter))
    ]
    spec = model.spec
    model.with_spec(recompute="full").for_training().loss(batch(), seed=1).backward()
    model.for_inference()(ids())
    model.with_adapter(randomised(model.adapter, 5)).generate(ids(), max_new_tokens=2)
    model.with_adapter(None)
    model.to("cpu")
    assert model.spec is spec
    for x, copy, version, required in before:
        assert torch.equal(x, copy) and x._version == version and x.requires_grad == required
        assert x.grad is None


def test_with_adapter_computes_with_the_given_tensors(model):
    other = randomised(model.adapter, 5)
    swapped = model.with_adapter(other)
    assert swapped.adapter is other and swapped.base is model.base
    assert torch.equal(swapped(ids()), FL.forward(other, model.base, model.spec, ids()))
    assert not torch.equal(swapped(ids()), model(ids()))


def test_with_adapter_none_is_the_base(model, base):
    plain = model.with_adapter(None)
    assert plain.adapter is None and plain.spec.lora is None
    assert torch.equal(plain(ids()), base(ids()))


def test_with_adapter_names_every_leaf_that_does_not_fit(model):
    leaves = iter(range(100))
    wrong = tree_map(lambda x: x[:, :1] if next(leaves) in (0, 3) else x, model.adapter)
    with pytest.raises(ValueError, match=r"leaf 0(.|\n)*leaf 3"):
        model.with_adapter(wrong)
    with pytest.raises(ValueError, match="floating"):
        model.with_adapter(tree_map(lambda x: x.long(), model.adapter))
    with pytest.raises(ValueError, match="structure"):
        model.with_adapter({"layers": model.adapter["layers"][:1]})


def test_a_model_without_lora_settings_refuses_an_adapter(model, base):
    with pytest.raises(ValueError, match=r"fastlora\.lora"):
        base.with_adapter(model.adapter)


def test_with_spec_changes_the_given_settings_and_no_tensor(model):
    changed = model.with_spec(recompute=0.5, compile=False, kernels="torch", deterministic=True)
    assert changed.base is model.base and changed.adapter is model.adapter
    spec = dataclasses.replace(
        model.spec, recompute=0.5, compile=False, kernels="torch", deterministic=True
    )
    assert changed.spec == spec and hash(changed.spec) == hash(spec)
    assert model.with_spec().spec == model.spec
    assert torch.equal(changed(ids()), model(ids()))


WRONG_SPECS: list[dict[str, Any]] = [
    {"recompute": "some"},
    {"recompute": 1.5},
    {"recompute": -0.1},
    {"recompute": math.nan},
    {"kernels": "cuda"},
    {"compile": "yes"},
]


@pytest.mark.parametrize("wrong", WRONG_SPECS, ids=str)
def test_with_spec_refuses_wrong_values(wrong, model):
    (name,) = wrong
    # Under the import hook jaxtyping may be first to refuse a value of the wrong type.
    with pytest.raises((ValueError, TypeError), match=name):
        model.with_spec(**wrong)


def test_with_spec_reports_all_problems_together(model, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"recompute(.|\n)*kernels"):
        model.with_spec(recompute=2.0, kernels="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
def test_with_spec_names_the_requirements_of_triton(model, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"triton"):
        model.with_spec(kernels="triton")


def test_to_the_same_device_copies_nothing(model):
    moved = model.to("cpu")
    pairs = zip(
        tree_leaves((moved.base, moved.adapter)),
        tree_leaves((model.base, model.adapter)),
        strict=True,
    )
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert {x.device.type for x in tree_leaves(model.to("meta").base)} == {"meta"}


# ── autograd history ──────────────────────────────────────────────────────────────────────


def test_only_for_training_records_history(model, base):
    assert not model(ids()).requires_grad and not base(ids()).requires_grad
    assert not model.loss(batch()).requires_grad
    training = model.for_training()
    assert training(ids()).requires_grad and training.loss(batch()).requires_grad
    assert not training.for_inference()(ids()).requires_grad
    assert not base.for_training()(ids()).requires_grad
    with torch.no_grad():
        assert not training(ids()).requires_grad


def test_an_optimisers_step_reaches_the_training_model(model):
    training = model.for_training()
    leaves = tree_leaves(training.adapter)
    assert all(x.is_leaf and x.requires_grad for x in leaves)
    before = training(ids()).detach()
    optimizer = torch.optim.SGD(leaves, lr=1e-2)
    loss = training.loss(batch())
    loss.backward()
    optimizer.step()
    assert not torch.equal(training(ids()), before)
    assert training.loss(batch()) < loss


def test_backward_gives_value_and_grads_gradient(model):
    training = model.for_training()
    training.loss(batch(), seed=3).backward()
    _, grads = fastlora.value_and_grad(FL.loss)(
        model.adapter, model.base, model.spec, batch(), seed=3
    )
    assert same_bits([x.grad for x in tree_leaves(training.adapter)], tree_leaves(grads))


def test_training_mode_draws_no_dropout_by_itself(model):
    assert torch.equal(model.for_training()(ids()), model(ids()))
    assert not torch.equal(model(ids(), seed=1), model(ids()))


def test_methods_work_under_torch_func(model):
    """model.loss is FL.loss: a transform over with_adapter differentiates."""
    grads = torch.func.grad(lambda a: model.with_adapter(a).loss(batch()))(model.adapter)
    _, expected = fastlora.value_and_grad(FL.loss)(model.adapter, model.base, model.spec, batch())
    torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-5)


# ── bad input ─────────────────────────────────────────────────────────────────────────────


INTS = torch.ones(2, 6, dtype=torch.int64)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"input_ids": ids(2, 0)}, "non-empty"),
    "negative": ({"input_ids": ids() - 200}, r"input_ids holds.*\[0, 96\)"),
    "beyond": ({"input_ids": ids() + 90}, r"input_ids holds.*\[0, 96\)"),
    "too long": ({"input_ids": ids(1, 129)}, "129 tokens.*max_seq_length is 128"),
    "int32": ({"input_ids": ids().int()}, "int64"),
    "mask shape": ({"attention_mask": INTS[:, :5]}, r"attention_mask must be.*\[2, 6\]"),
    "segment shape": ({"segment_ids": INTS[:1]}, r"segment_ids must be.*\[2, 6\]"),
    "position shape": ({"position_ids": INTS[:, :3]}, r"position_ids must be.*\[2, 6\]"),
    "label shape": ({"labels": INTS[:, :3]}, r"labels must be.*\[2, 6\]"),
    "labels beyond": ({"labels": ids() + 90}, "labels holds"),
    "labels -1": ({"labels": ids() * 0 - 1}, "labels holds"),
    "an unknown entry": ({"label": ids()}, "unknown entry 'label'"),
    "positions below 0": ({"position_ids": INTS - 2}, "position_ids"),
    "a mask of fives": ({"attention_mask": 5 * INTS}, "attention_mask"),
}


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test if the decoder runs."""
    run = lambda *args, **kwargs: pytest.fail("the model ran")
    monkeypatch.setattr("fastlora.models.outputs.hidden_states", run)


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_batch_is_refused_before_any_work(case, model, no_work):
    changed, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        model.loss(batch() | changed)
    # In a run with the import hook, jaxtyping refuses the other wrong shapes with its own error.
    if changed.keys() == {"input_ids"}:
        with pytest.raises(ValueError, match=message):
            model(**changed)


@pytest.mark.parametrize("missing", ["input_ids", "labels"])
def test_a_missing_entry_is_named(missing, model, no_work):
    with pytest.raises(ValueError, match=f"missing {missing}"):
        model.loss({k: v for k, v in batch().items() if k != missing})


def test_all_wrong_shapes_are_reported_together_then_all_wrong_values(model, no_work):
    wrong = dict(attention_mask=INTS[:, :5], segment_ids=INTS[:, :4])
    with pytest.raises(ValueError, match=r"attention_mask(.|\n)*segment_ids"):
        model.loss(batch() | wrong)
    wrong = dict(input_ids=ids() + 90, attention_mask=5 * INTS, position_ids=-INTS)
    with pytest.raises(
        ValueError, match=r"input_ids holds(.|\n)*attention_mask holds(.|\n)*position_ids holds"
    ):
        model.loss(batch() | wrong)


def test_input_on_another_device_is_refused(model, no_work):
    with pytest.raises(ValueError, match="meta"):
        model(ids().to("meta"))


def test_shared_positions_and_a_mask_of_ones_change_nothing(model):
    positions = torch.arange(6)[None]
    assert torch.equal(model(ids(), position_ids=positions), model(ids()))
    assert torch.equal(model(ids(), attention_mask=INTS), model(ids()))


def test_saving_without_an_adapter_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        base.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ── counting ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["llama2", "llama3.2", "qwen2", "smollm3"])
@pytest.mark.parametrize("r, targets", [(4, ["q_proj", "v_proj"]), (1, "all-linear")])
def test_the_printed_line_equals_that_of_peft(family, r, targets, pair, capsys):
    """To the character; r = 1 and all-linear vary the number of digits."""
    one = pair(family)
    config = LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM")
    get_peft_model(one.fresh_oracle(), config).print_trainable_parameters()
    expected = capsys.readouterr().out
    fastlora.lora(one.model, r=r, target_modules=targets).print_trainable_parameters()
    assert capsys.readouterr().out == expected != ""


def test_parameters_are_counted_once(base, pair):
    theirs = lambda one: sum(p.numel() for p in one.oracle.parameters())
    for family in ("llama2", "llama3.2"):  # untied, tied
        one = pair(family)
        assert one.model.num_parameters() == theirs(one)
        assert one.model.num_parameters(trainable=True) == 0
    model = fastlora.lora(base, r=4, target_modules=["q_proj"])
    assert model.num_parameters(trainable=True) == 2 * 4 * (32 + 32)
    assert model.num_parameters() == base.num_parameters() + 2 * 4 * (32 + 32)


def test_a_model_without_an_adapter_prints_zero(base, capsys):
    base.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 0 || all params: ")


# ── text ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def demo():
    return fastlora.load("demo", device="cpu")


def test_generate_text_gives_the_continuation_alone(demo):
    model, tokenizer = demo
    pieces: list[str] = []
    text = model.generate_text(tokenizer, "def add(a, b):", max_new_tokens=12, stream=pieces.append)
    prompt = tokenizer.encode("def add(a, b):")
    out = model.generate(torch.tensor([prompt]), max_new_tokens=12)
    assert text == tokenizer.decode(out[0, len(prompt) :].tolist()) == "".join(pieces)


@pytest.mark.parametrize("name", ["return_logprobs", "input_ids"])
def test_generate_text_names_arguments_of_generate_that_it_does_not_take(demo, name):
    model, tokenizer = demo
    with pytest.raises(ValueError, match=f"{name}: .*Model.generate "):
        model.generate_text(tokenizer, "a", **{name: True})


def test_generate_text_takes_messages(demo):
    model, tokenizer = demo
    messages = [{"role": "user", "content": "def add(a, b):"}]
    text = model.generate_text(tokenizer, messages, max_new_tokens=8)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=8, eos_token_id=sorted(tokenizer.eos_token_ids)
    )
    assert text == tokenizer.decode(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("seed", [-1, 2**63, 10**400, True, 1.5])
def test_a_seed_out_of_range_is_refused(model, seed):
    # The type hook refuses 1.5 before the function does.
    with pytest.raises((ValueError, TypeCheckError), match="seed"):
        model(torch.ones(1, 3, dtype=torch.int64), seed=seed)


@pytest.mark.parametrize("path", ["~/x", Path("~/x"), "~"])
def test_a_path_that_only_a_shell_understands_is_refused(model, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"folder=.*leading ~"):
        model.save_pretrained(path)
    assert not [*tmp_path.iterdir()]
