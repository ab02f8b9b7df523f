"""lora(): the modules it picks, their ranks, scalings and first weights. Oracle: PEFT itself."""

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from peft import LoraConfig as PeftConfig
from peft import LoraModel, get_peft_model

from fastlora.adapters.create import lora
from fastlora.models.names import module_names, projection_path, projection_shape
from fastlora.models.params import PROJECTIONS
from oracles.meta_models import on_meta_device

ALL = list(PROJECTIONS)

# Arguments for both libraries, over three layers.
CASES = {
    "one name": dict(target_modules=["q_proj"]),
    "all seven names": dict(target_modules=ALL),
    "None is PEFT's default": dict(target_modules=None),
    "all-linear": dict(target_modules="all-linear"),
    "All-Linear": dict(target_modules="All-Linear"),
    "dotted end": dict(target_modules=["self_attn.q_proj", "mlp.up_proj"]),
    "end with a layer": dict(target_modules=["1.self_attn.v_proj", "layers.2.mlp.down_proj"]),
    "full name": dict(target_modules=["model.layers.1.mlp.gate_proj"]),
    "more than 20 full names": dict(
        target_modules=[projection_path(i, n) for i in range(3) for n in ALL]
    ),
    "regex": dict(target_modules=r".*\.(q|v)_proj"),
    "regex that names a layer": dict(target_modules=r"model\.layers\.[02]\.mlp\.\w+_proj"),
    "exclude a name": dict(target_modules=ALL, exclude_modules=["down_proj"]),
    "exclude a dotted end": dict(target_modules=ALL, exclude_modules=["0.self_attn.q_proj"]),
    "exclude a module of the wrong kind": dict(target_modules=ALL, exclude_modules=["lm_head"]),
    "exclude a regex": dict(target_modules=ALL, exclude_modules=r".*\.1\..*"),
    "regex and exclude": dict(target_modules=r".*_proj", exclude_modules=["o_proj"]),
    "all-linear and exclude": dict(target_modules="all-linear", exclude_modules=r".*mlp.*"),
    "layers": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2]),
    "one layer": dict(target_modules=["q_proj"], layers_to_transform=1),
    "no layers is all": dict(target_modules=["q_proj"], layers_to_transform=[]),
    "layers and a pattern": dict(
        target_modules=["v_proj"], layers_to_transform=[1], layers_pattern="layers"
    ),
    "layers and a list of patterns": dict(
        target_modules=["v_proj"], layers_to_transform=2, layers_pattern=["layers"]
    ),
    "a full name ignores the layers": dict(
        target_modules=["model.layers.0.self_attn.q_proj", "v_proj"], layers_to_transform=[2]
    ),
    "layers and exclude": dict(
        target_modules=ALL, layers_to_transform=[0, 1], exclude_modules=["0.mlp.up_proj"]
    ),
    "rslora": dict(target_modules=ALL, use_rslora=True),
    "rank pattern": dict(target_modules=ALL, rank_pattern={"q_proj": 2, "mlp.up_proj": 7}),
    "rank pattern, regex": dict(target_modules=ALL, rank_pattern={r"layers\.[01]\..*_proj": 3}),
    "rank pattern, anchored": dict(
        target_modules=ALL, rank_pattern={r"^model\.layers\.1\.mlp\.down_proj": 5}
    ),
    "patterns overlap, first wins": dict(
        target_modules=ALL, rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.q_proj": 6}
    ),
    "patterns overlap, narrow first": dict(
        target_modules=ALL, rank_pattern={r"layers\.1\.self_attn\.q_proj": 6, "q_proj": 2}
    ),
    "alpha pattern": dict(target_modules=ALL, alpha_pattern={"v_proj": 3, r".*mlp\..*": 0.5}),
    "rank and alpha apart": dict(
        target_modules=ALL, rank_pattern={"v_proj": 5}, alpha_pattern={r".*\.2\..*": 11}
    ),
    "both patterns with rslora": dict(
        target_modules=["v_proj", "o_proj"],
        rank_pattern={"v_proj": 5},
        alpha_pattern={"o_proj": 11},
        use_rslora=True,
    ),
}


@functools.cache
def small(family="llama2", layers=3):
    """fastlora's model with zeros for weights, on the CPU."""
    _, model = on_meta_device(family, num_hidden_layers=layers)
    tensors = torch.utils._pytree.tree_map(lambda t: torch.zeros_like(t, device="cpu"), model.base)
    return dataclasses.replace(model, base=tensors)


@pytest.mark.parametrize("family", ["llama2", "qwen3"])
@pytest.mark.parametrize("case", CASES)
def test_targets_ranks_and_scalings_are_those_of_peft(family, case):
    hf, model = on_meta_device(family, num_hidden_layers=3)
    asked = dict(r=4, lora_alpha=6) | CASES[case]
    peft = LoraModel(hf, PeftConfig(**asked, task_type="CAUSAL_LM"), "default")
    expected = {
        name: (m.r["default"], m.lora_alpha["default"], m.scaling["default"])
        for name in peft.targeted_module_names
        for m in [peft.model.get_submodule(name)]
    }
    targets = lora(model, **asked).spec.lora.targets
    found = {
        projection_path(i, t.name): (t.r, t.lora_alpha, t.scaling)
        for i, layer in enumerate(targets)
        for t in layer
    }
    assert found == expected


@pytest.mark.parametrize("family", ["llama2", "llama3.2", "mistral", "qwen2", "qwen3", "smollm3"])
def test_module_names_are_those_of_transformers(family):
    hf, model = on_meta_device(family)
    assert sorted(module_names(model.spec.config)) == sorted(n for n, _ in hf.named_modules() if n)


def test_adapter_tree_has_the_shapes_of_its_targets():
    model = lora(small(), target_modules=["v_proj", "down_proj"], rank_pattern={"v_proj": 3})
    for layer in model.adapter["layers"]:
        assert list(layer) == ["v_proj", "down_proj"]
        for name, (a, b) in layer.items():
            d_out, d_in = projection_shape(model.spec.config, name)
            r = 3 if name == "v_proj" else 16
            assert (a.shape, b.shape) == ((r, d_in), (d_out, r))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", torch.bfloat16])
def test_adapter_has_the_dtype_asked_for(dtype):
    model = lora(small(layers=1), adapter_dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {t.dtype for pair in model.adapter["layers"][0].values() for t in pair} == {wanted}


def spread(init):
    """A and B of a wide projection: enough draws for the moments to show."""
    _, model = on_meta_device("llama2", num_hidden_layers=1, hidden_size=512, head_dim=16)
    model = dataclasses.replace(model, base={**model.base, "norm": torch.zeros(512)})
    model = lora(model, r=64, target_modules=["q_proj", "up_proj"], init_lora_weights=init)
    return model.adapter["layers"][0]["q_proj"]


def test_default_start_is_uniform_a_and_zero_b():
    a, b = spread(True)
    bound = 1 / math.sqrt(a.shape[1])
    assert not b.any()
    assert 0.99 * bound < a.abs().max() <= bound
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(a.mean()) < 0.02 * bound


def test_gaussian_start_has_deviation_one_over_rank():
    a, b = spread("gaussian")
    assert not b.any()
    assert a.std() == pytest.approx(1 / 64, rel=0.02)
    assert a.abs().max() > 3 / 64  # a uniform of this deviation ends at 1.73 / 64


def test_orthogonal_start_equals_pefts_and_does_not_change_the_model():
    a, b = spread("orthogonal")
    assert (b @ a).abs().max() < 1e-6 < a.abs().max() < 1
    # Elements are sums of r/2 products of a normal and an element of an orthogonal [r, r] matrix.
    layer = torch.nn.Linear(512, 512, bias=False)
    config = PeftConfig(r=64, target_modules=["0"], init_lora_weights="orthogonal")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = get_peft_model(torch.nn.Sequential(layer), config).base_model.model[0]
    assert a.std() == pytest.approx(theirs.lora_A["default"].weight.std().item(), rel=0.03)
    assert b.std() == pytest.approx(theirs.lora_B["default"].weight.std().item(), rel=0.03)


def test_lora_bias_starts_at_zero_or_as_b_does():
    first = lambda init: lora(small(), lora_bias=True, init_lora_weights=init).adapter["layers"][0]
    assert not first(True)["up_proj"].bias.any()
    record = first(False)["up_proj"]
    assert record.bias.shape == record.b.shape[:1]
    assert 0 < record.bias.abs().max() <= 1 / math.sqrt(record.b.shape[1])


def test_random_start_moves_the_model_at_once():
    a, b = spread(False)
    assert a.abs().max() <= 1 / math.sqrt(a.shape[1])
    assert b.std() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.03)


def test_same_random_state_gives_the_same_weights_and_another_does_not():
    first, again, other = (
        torch.utils._pytree.tree_leaves(lora(small(), random_state=s).adapter) for s in (1, 1, 2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_no_two_projections_start_alike():
    leaves = lora(small(), target_modules=["q_proj", "k_proj"]).adapter["layers"]
    starts = [pair.a for layer in leaves for pair in layer.values()]
    assert not any(torch.equal(x, y) for i, x in enumerate(starts) for y in starts[:i])


def test_nothing_global_is_touched_and_the_model_given_is_unchanged():
    model = small()
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    adapted = lora(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert model.adapter is None and model.spec.lora is None
    assert adapted.base is model.base


def test_finetune_last_n_layers_is_short_for_their_indices():
    short = lora(small(), finetune_last_n_layers=2)
    assert short.spec.lora == lora(small(), layers_to_transform=[1, 2]).spec.lora
    assert [bool(layer) for layer in short.spec.lora.targets] == [False, True, True]


@pytest.mark.parametrize(
    ("arguments", "policy"),
    [
        ({}, "selective"),
        (dict(use_gradient_checkpointing=False), "none"),
        (dict(use_gradient_checkpointing=True), "full"),
        (dict(use_gradient_checkpointing="unsloth"), "selective"),
        (dict(recompute="offload"), "offload"),
        (dict(recompute=0.25), 0.25),
        (dict(recompute=1), 1),
    ],
)
def test_recompute_has_two_names(arguments, policy):
    assert lora(small(), **arguments).spec.recompute == policy


def test_max_seq_length_is_lowered():
    assert lora(small(), max_seq_length=10).spec.max_seq_length == 10
    assert lora(small()).spec.max_seq_length == 64


def test_settings_are_hashable_from_any_collection():
    sets = lora(small(), target_modules={"v_proj", "q_proj"}, rank_pattern={"q_proj": 2})
    lists = lora(small(), target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})
    assert hash(sets.spec) == hash(lists.spec)


IMPOSSIBLE = {
    "r=0": dict(r=0),
    "r=-3": dict(r=-3),
    "rank_pattern['q_proj']=0": dict(rank_pattern={"q_proj": 0}),
    "lora_alpha=inf": dict(lora_alpha=math.inf),
    "lora_alpha=nan": dict(lora_alpha=math.nan),
    "['lora_alpha'] are 0": dict(lora_alpha=0),
    "alpha_pattern['q_proj']=nan": dict(alpha_pattern={"q_proj": math.nan}),
    "lora_dropout=1.5": dict(lora_dropout=1.5),
    "lora_dropout=1 ": dict(lora_dropout=1.0),
    "lora_dropout=-0.1": dict(lora_dropout=-0.1),
    "'wq' matches no module": dict(target_modules=["q_proj", "wq"]),
    "'proj' matches no module": dict(target_modules=["proj"]),
    "target_modules='q_proj', a regex": dict(target_modules="q_proj"),
    "target_modules=() matches no module": dict(target_modules=[]),
    "target_modules='', a regex": dict(target_modules=""),
    "target_modules: '(' is not a regular expression": dict(target_modules="("),
    "exclude_modules: '(' is not a regular expression": dict(exclude_modules="("),
    "rank_pattern: '(' is not a regular expression": dict(rank_pattern={"(": 1}),
    "matches model.norm, which is not a linear layer": dict(target_modules=["model.norm"]),
    "matches model.layers.0.self_attn,": dict(target_modules=r".*\.0\.self_attn"),
    "exclude_modules: 'k_prox'": dict(exclude_modules=["k_prox"]),
    "exclude_modules: 'k_proj'": dict(exclude_modules="k_proj"),
    "after exclude_modules": dict(target_modules=["q_proj"], exclude_modules=["q_proj"]),
    "layers_to_transform: this model has no layer 3": dict(layers_to_transform=[0, 3]),
    "layers_to_transform: this model has no layer -1": dict(layers_to_transform=-1),
    "layers_pattern: 'h' matches": dict(layers_to_transform=0, layers_pattern=["layers", "h"]),
    "layers_pattern=('layers',) needs": dict(layers_pattern="layers"),
    "only filter a list": dict(target_modules="all-linear", layers_to_transform=[0]),
    "finetune_last_n_layers only filter": dict(target_modules=".*q_proj", finetune_last_n_layers=1),
    "finetune_last_n_layers=0": dict(finetune_last_n_layers=0),
    "finetune_last_n_layers=4": dict(finetune_last_n_layers=4),
    "two forms of one setting; give one": dict(finetune_last_n_layers=1, layers_to_transform=[0]),
    "rank_pattern: 'proj'": dict(rank_pattern={"proj": 3}),
    "alpha_pattern: 'k_proj'": dict(target_modules=["q_proj"], alpha_pattern={"k_proj": 3}),
    "init_lora_weights='foo'": dict(init_lora_weights="foo"),
    "recompute=1.5": dict(recompute=1.5),
    "use_gradient_checkpointing='mlx'": dict(use_gradient_checkpointing="mlx"),
    "two names of one setting": dict(use_gradient_checkpointing=True, recompute="none"),
    "max_seq_length=65": dict(max_seq_length=65),
    "max_seq_length=0": dict(max_seq_length=0),
    "random_state=-1": dict(random_state=-1),
    "adapter_dtype='int8'": dict(adapter_dtype="int8"),
    "needs even ranks": dict(r=4, rank_pattern={"q_proj": 3}, init_lora_weights="orthogonal"),
    "lora_bias=True": dict(lora_bias=True, init_lora_weights="gaussian"),
    "exclude each other": dict(lora_bias=True, use_dora=True),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_an_impossible_argument_is_refused_by_name(message):
    with pytest.raises(ValueError) as refused:
        lora(small(), **IMPOSSIBLE[message])
    assert message in str(refused.value)


def test_an_unknown_recompute_policy_is_refused():
    # With the type hook on, the hook refuses first.
    with pytest.raises((ValueError, TypeCheckError), match="everything"):
        lora(small(), recompute="everything")


def test_all_problems_are_listed_at_once():
    with pytest.raises(ValueError) as refused:
        lora(small(), r=0, target_modules=["wq"], lora_dropout=2.0, max_seq_length=1000)
    for part in ("r=0", "'wq'", "lora_dropout=2.0", "max_seq_length=1000"):
        assert part in str(refused.value)


def test_a_second_adapter_is_refused():
    with pytest.raises(ValueError, match="merge"):
        lora(lora(small()))


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from(ALL), min_size=1), st.sets(st.integers(0, 2), min_size=1))
def test_short_names_and_full_names_mean_the_same(names, layers):
    short = lora(small(), target_modules=names, layers_to_transform=layers)
    full = lora(small(), target_modules={projection_path(i, n) for n in names for i in layers})
    assert short.spec.lora.targets == full.spec.lora.targets
