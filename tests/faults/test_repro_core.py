"""Section A of issue 16: one minimal reproduction for each defect of the core."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import fastlora
from fastlora import functional as FL
from faults import folders
from faults.case import IDS, tuned

BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture
def base(tmp_path) -> Path:
    """A model's folder with its tokenizer."""
    return folders.write_all(tmp_path) / "base"


def load(folder, **settings):
    return fastlora.load(folder, device="cpu", local_files_only=True, **settings)


def test_a1_an_adapter_over_a_merged_base_gives_its_logits_or_is_refused(base, tmp_path):
    model, _ = load(base)
    again = tuned(fastlora.merge(tuned(model)), seed=1)
    try:
        again.save_pretrained(tmp_path / "adapter")
    except ValueError as error:
        assert "save_pretrained_merged" in str(error)
        return
    read, _ = load(tmp_path / "adapter")
    torch.testing.assert_close(read(IDS), again(IDS), rtol=1e-5, atol=1e-5)


REVISIONS = {"main": "1" * 40, "older": "2" * 40}


@pytest.fixture
def cache(tmp_path) -> Path:
    """A Hub cache that holds a/b twice: the branch main, and another one, "older"."""
    models = folders.write_all(tmp_path / "models")
    repository = tmp_path / "cache" / "models--a--b"
    (repository / "refs").mkdir(parents=True)
    for (branch, commit), name in zip(REVISIONS.items(), ("base", "other"), strict=True):
        (repository / "refs" / branch).write_text(commit)
        shutil.copytree(models / name, repository / "snapshots" / commit)
    return tmp_path / "cache"


def test_a2_the_revision_of_the_base_is_kept(cache, tmp_path):
    model, _ = load("a/b", revision="older", cache_dir=cache)
    model = tuned(model)
    model.save_pretrained(tmp_path / "adapter")
    read, _ = load(tmp_path / "adapter", cache_dir=cache)
    torch.testing.assert_close(read(IDS), model(IDS), rtol=1e-6, atol=1e-6)


def grad_norm(folder: Path, rows: int, dtype: str) -> float:
    """Of one step over `rows` equal rows: the mean's gradient does not depend on their number."""
    model, tokenizer = load(folder, dtype=dtype)
    row = {"text": " ".join(folders.WORDS[:50])}
    settings = dict(packing=False, max_steps=1, progress=False, batch_size=rows)
    return fastlora.train(tuned(model), tokenizer, [row] * rows, **settings)[1].grad_norms[0]


def test_a3_the_gradient_of_a_float16_base_does_not_depend_on_the_tokens_of_a_step(base):
    """A head of small weights replaces many tokens: both give gradients below float16's 6e-5."""
    path = base / "model.safetensors"
    tensors = {name: x.clone() for name, x in load_file(path).items()}  # not views of the file
    save_file(tensors | {"lm_head.weight": 1e-3 * tensors["lm_head.weight"]}, path)
    expected = grad_norm(base, 1, "float32")
    assert grad_norm(base, 32, "float32") == pytest.approx(expected, rel=1e-5)
    assert grad_norm(base, 32, "float16") == pytest.approx(expected, rel=0.01)


SETTINGS = [
    dict(),
    dict(lora_bias=True),
    dict(use_dora=True),
    dict(modules_to_save=["norm"]),
    dict(init_lora_weights="pissa"),
    dict(target_modules=["q_proj", "lm_head"]),
    dict(trainable_token_indices=[1, 2]),
]


def value_of(lora, trained: list[int]) -> torch.Tensor:
    """The loss, with the gradient of the adapter's leaves of these numbers alone."""
    leaves, structure = tree_flatten(lora.adapter)

    def loss(some):
        whole = list(leaves)
        for i, leaf in zip(trained, some, strict=True):
            whole[i] = leaf
        return FL.loss(tree_unflatten(whole, structure), lora.base, lora.spec, BATCH)

    value, gradient = fastlora.value_and_grad(loss)([leaves[i] for i in trained])
    assert len(gradient) == len(trained)
    return value


@pytest.mark.compile
def test_a4_twenty_kinds_of_gradient_in_one_process(base, monkeypatch):
    """The backend is dynamo's cheapest one. The limit counts graphs of any backend."""
    monkeypatch.setattr("fastlora.runtime.compiled.backend", "eager")
    torch._dynamo.reset()
    model = load(base)[0].with_spec(compile=True)
    for settings in SETTINGS:
        lora = fastlora.lora(model, r=2, **settings)
        assert value_of(lora, [*range(len(tree_leaves(lora.adapter)))]).isfinite()
    lora = fastlora.lora(model, r=2)
    for i in range(1, 14):
        assert value_of(lora, [0, i]).isfinite()


def test_a5_dropout_masks_of_a_stack_are_those_of_each_adapter_alone(base):
    model, _ = load(base)
    ones = [tuned(model, seed, lora_dropout=0.5) for seed in (1, 2)]
    stack = tree_map(lambda *leaves: torch.stack(leaves), *(one.adapter for one in ones))
    spec = ones[0].spec
    ids = torch.tensor([1, 0])
    logits = FL.forward(stack, model.base, spec, IDS, adapter_ids=ids, seed=7)
    for row, i in enumerate(ids.tolist()):
        alone = FL.forward(ones[i].adapter, model.base, spec, IDS, seed=7)[row]
        torch.testing.assert_close(logits[row], alone, rtol=1e-5, atol=1e-5)


def test_a6_a_merged_folder_keeps_the_settings_of_generation(base, tmp_path):
    import json

    path = base / "generation_config.json"
    given = dict(temperature=0.6, top_p=0.9, do_sample=True, top_k=50, repetition_penalty=1.1)
    path.write_text(json.dumps(json.loads(path.read_text()) | given))
    model, tokenizer = load(base)
    tuned(model).save_pretrained_merged(tmp_path / "merged", tokenizer)
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert {name: written.get(name) for name in given} == given


def loss_of(model):
    return lambda adapter: FL.loss(adapter, model.base, model.spec, BATCH)


@pytest.fixture
def wide(base):
    """An adapted model in float64."""
    return tuned(load(base, dtype="float64")[0], adapter_dtype="float64")


def expected_jvp(model, direction):
    return torch.func.jvp(loss_of(model), (model.adapter,), (direction,))


def test_a7_linearize_gives_the_derivative(wide):
    direction = tree_map(torch.ones_like, wide.adapter)
    value, push = torch.func.linearize(loss_of(wide), wide.adapter)
    expected = expected_jvp(wide, direction)
    torch.testing.assert_close((value, push(direction)), expected, rtol=1e-9, atol=1e-12)


def test_a7_forward_ad_gives_the_derivative(wide):
    from torch.autograd import forward_ad

    direction = tree_map(torch.ones_like, wide.adapter)
    with forward_ad.dual_level():
        dual = tree_map(forward_ad.make_dual, wide.adapter, direction)
        got = forward_ad.unpack_dual(loss_of(wide)(dual))
    expected = expected_jvp(wide, direction)
    torch.testing.assert_close((got.primal, got.tangent), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad"])
def test_a7_value_and_grad_inside_a_transform_is_grad_and_value(wide, transform):
    def with_ours(adapter):
        value, gradient = fastlora.value_and_grad(loss_of(wide))(adapter)
        return value + sum(x.square().sum() for x in tree_leaves(gradient))

    def with_torchs(adapter):
        gradient, value = torch.func.grad_and_value(loss_of(wide))(adapter)
        return value + sum(x.square().sum() for x in tree_leaves(gradient))

    def run(fn):
        if transform == "grad":
            return torch.func.grad(fn)(wide.adapter)
        if transform == "jvp":
            direction = tree_map(torch.ones_like, wide.adapter)
            return torch.func.jvp(fn, (wide.adapter,), (direction,))
        return torch.vmap(fn)(tree_map(lambda x: torch.stack((x, 2 * x)), wide.adapter))

    for ours, theirs in zip(
        tree_leaves(run(with_ours)), tree_leaves(run(with_torchs)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def one_step(model, tokenizer, **settings):
    given = dict(max_steps=1, batch_size=2, packing=False, progress=False) | settings
    return fastlora.train(model, tokenizer, folders.rows(4), **given)[0]


def test_a8_weight_decay_leaves_norms_alone(base):
    model, tokenizer = load(base)
    model = tuned(model, modules_to_save=["norm"], lora_dropout=0.0)
    after = [one_step(model, tokenizer, warmup_ratio=0, weight_decay=d) for d in (0.0, 0.5)]
    norms = [next(iter(m.adapter["replaced"].values())) for m in after]
    assert torch.equal(*norms)


def test_a8_a_run_of_one_step_trains_something_or_is_refused(base):
    model, tokenizer = load(base)
    model = tuned(model)
    try:
        after = one_step(model, tokenizer)
    except ValueError as error:
        assert "warmup_ratio" in str(error)
        return
    pairs = zip(tree_leaves(model.adapter), tree_leaves(after.adapter), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_a8_lora_keeps_the_models_recompute_policy(base):
    model, _ = load(base)
    model = model.with_spec(recompute="full")
    assert fastlora.lora(model, r=2).spec.recompute == "full"
