"""Adapters of mixtures of experts out to PEFT and back. Oracles: PEFT and transformers."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

from fastlora.adapters.create import lora
from fastlora.adapters.edits.combining import combine
from fastlora.errors import CheckpointError
from fastlora.formats.peft.names import peft_state_dict
from fastlora.formats.peft.reading import load_adapter
from fastlora.formats.peft.writing import save_adapter
from fastlora.models.names import projection_path
from fastlora.models.params import EXPERTS, ExpertLoRA, LoRA
from oracles.expert_cases import BOTH, EXPERT_CASES, NONE
from oracles.meta_models import on_meta_device
from oracles.peft_cases import SEVEN
from oracles.peft_side import (
    difference,
    edit,
    fast,
    hf_logits,
    hugging_face,
    logits,
    peft_read,
    peft_saved,
    with_random_adapter,
)


@pytest.mark.parametrize("name", EXPERT_CASES)
def test_targets_ranks_and_scalings_are_those_of_peft(name):
    family, settings = EXPERT_CASES[name]
    hf, model = on_meta_device(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = LoraModel(hf, PeftConfig(**settings, task_type="CAUSAL_LM"), "default")
    expected = set()
    for path, m in peft.model.named_modules():
        if hasattr(m, "lora_A"):
            name = getattr(m, "parameter_name", "weight")
            full = path.replace(".base_layer", "") + f".{name}".removesuffix(".weight")
            expected.add((full, m.r["default"], m.lora_alpha["default"], m.scaling["default"]))
    targets = lora(model, **{"lora_alpha": 8} | settings).spec.lora.targets
    found = {
        (projection_path(i, t.name), t.r, t.lora_alpha, t.scaling)
        for i, layer in enumerate(targets)
        for t in layer
    }
    assert found == expected


def test_the_wrong_flattening_would_show(tmp_path):
    """peft-format.md 1.9: B expert-major in place of rank-major moves the logits."""
    family, settings = EXPERT_CASES["both"]
    peft_saved(family, tmp_path, **settings)
    expected = hf_logits(peft_read(family, tmp_path))
    model = load_adapter(fast(family), tmp_path)
    swap = lambda x: x.permute(1, 2, 0).flatten(1).view(x.shape[1], x.shape[0], -1).transpose(0, 1)
    layers = tuple(
        {n: ExpertLoRA(x.a, swap(x.b).contiguous()) for n, x in layer.items()}
        for layer in model.adapter["layers"]
    )
    wrong = model.with_adapter({"layers": layers})
    base = logits(fast(family))
    assert difference(logits(model), expected, base) <= 1e-5
    assert difference(logits(wrong), expected, base) > 1e-2


# ── round trips and fresh weights ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["both", "experts, router and attention", "one layer's, in full"])
def test_round_trips_are_equal_to_the_bit(name, tmp_path):
    family, settings = EXPERT_CASES[name]
    model = with_random_adapter(lora(fast(family), **settings))
    save_adapter(model, tmp_path)
    again = load_adapter(fast(family), tmp_path)
    pairs = zip(tree_leaves(again.adapter), tree_leaves(model.adapter), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert again.spec.lora.targets == model.spec.lora.targets


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_fresh_weights_have_the_distribution_of_pefts(init):
    settings = dict(r=8, target_modules=NONE, target_parameters=BOTH, init_lora_weights=init)
    model = lora(fast("qwen3_moe"), **settings)
    config = PeftConfig(**settings, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        torch.manual_seed(0)
        peft = get_peft_model(hugging_face("qwen3_moe"), config)
    theirs = {k.replace(".default", ""): v for k, v in peft.state_dict().items() if "lora_" in k}
    ours = peft_state_dict(model.adapter, model.spec.lora)
    assert ours.keys() == theirs.keys()
    for key, x in ours.items():
        y = theirs[key]
        assert x.shape == y.shape
        assert x.std().item() == pytest.approx(y.std().item(), rel=0.15, abs=1e-12), key
        assert x.abs().max().item() == pytest.approx(y.abs().max().item(), rel=0.5, abs=1e-12)


def test_a_fresh_adapter_is_the_base_and_orthogonal_too():
    base = logits(fast("mixtral"))
    for init in (True, "orthogonal"):
        model = lora(fast("mixtral"), r=4, target_parameters=BOTH, init_lora_weights=init)
        torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-5)


def test_names_shapes_and_parameter_count_equal_pefts():
    settings = dict(r=4, target_modules=["q_proj"], target_parameters=[*BOTH, "gate.weight"])
    model = lora(fast("qwen3_moe_mixed"), **settings)
    sparse, dense, _ = model.adapter["layers"]
    assert list(sparse) == ["q_proj", "gate", *EXPERTS] and list(dense) == ["q_proj"]
    assert isinstance(sparse["gate"], LoRA) and isinstance(sparse[EXPERTS[0]], ExpertLoRA)
    assert sparse[EXPERTS[0]].a.shape == (4, 4, 32) and sparse[EXPERTS[1]].b.shape == (4, 32, 4)
    peft = get_peft_model(
        hugging_face("qwen3_moe_mixed"), PeftConfig(**settings, task_type="CAUSAL_LM")
    )
    trainable, total = peft.get_nb_trainable_parameters()
    assert model.num_parameters(trainable=True) == trainable
    assert model.num_parameters() == total


# ── refusals ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(target_parameters="down_proj"), "expected None or a list of names"),
        (dict(target_parameters=BOTH, lora_dropout=0.1), "lora_dropout=0.1 does not go with"),
        (dict(target_parameters=BOTH, use_dora=True), "use_dora=True does not go with"),
        (dict(target_parameters=BOTH, lora_bias=True), "lora_bias=True does not go with"),
        (dict(target_parameters=["experts.down"]), "'experts.down' matches no parameter"),
        (dict(target_parameters=["norm.weight"]), "model.norm.weight, which is neither"),
        (dict(target_parameters=["q_proj.weight"]), "target_modules matches too"),
        (dict(target_modules=["gate_proj", "q_proj"]), "'gate_proj' without 'up_proj'"),
        (dict(target_modules=["up_proj"]), "'up_proj' without 'gate_proj'"),
        (dict(target_modules=["w1", "w2", "w3"]), "'w1' matches no module"),
        (dict(target_modules=["experts"]), "not a linear layer"),
        (dict(target_modules=None), "matches no module"),
        (dict(lora_dropout=0.1), "lora_dropout=0.1 does not go with"),
        (dict(layers_to_transform=[1]), "does not filter target_parameters"),
        (dict(finetune_last_n_layers=1), "does not filter target_parameters"),
        (dict(exclude_modules=["mlp.experts"]), "exclude_modules=.* does not keep"),
    ],
    ids=str,
)
def test_arguments_that_peft_refuses_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        lora(fast("qwen3_moe"), **{"target_modules": SEVEN} | settings)


@pytest.mark.parametrize("name", ["gate_proj", "gate_up_proj"])
def test_a_regex_that_is_slow_on_experts_names_only_is_refused(name):
    pattern = rf"(?=.*experts\.{name}$)(.|.|.)+(.|.|.)+(.|.|.)+X|y"
    with pytest.raises(ValueError, match="takes too long to match"):
        lora(fast("qwen3_moe"), target_modules=pattern)


def test_adapters_of_experts_are_not_combined():
    model = with_random_adapter(lora(fast("mixtral"), r=4, target_parameters=BOTH))
    with pytest.raises(ValueError, match="target_parameters"):
        combine([model, model], [0.5, 0.5])


# ── files that spell every expert ─────────────────────────────────────────────────────────


NAMES = {
    "mixtral": ("block_sparse_moe", ["w1", "w3", "w2"], (56, 32)),
    "qwen3_moe": ("mlp", ["gate_proj", "up_proj", "down_proj"], (24, 32)),
}


def per_expert_files(family: str, folder: Path, targets: list[str]) -> None:
    """What PEFT wrote over transformers 4: an A and a B for each expert's every matrix."""
    module, names, (f, d) = NAMES[family]
    gen = torch.Generator().manual_seed(3)
    draw = lambda *shape: 0.15 * torch.randn(shape, generator=gen)
    tensors = {}
    for i in range(2):
        prefix = f"base_model.model.model.layers.{i}"
        if "q_proj" in targets:
            q = 64 if family == "qwen3_moe" else 32
            tensors[f"{prefix}.self_attn.q_proj.lora_A.weight"] = draw(4, d)
            tensors[f"{prefix}.self_attn.q_proj.lora_B.weight"] = draw(q, 4)
        if "gate" in targets:
            tensors[f"{prefix}.{module}.gate.lora_A.weight"] = draw(4, d)
            tensors[f"{prefix}.{module}.gate.lora_B.weight"] = draw(4, 4)
        for e in range(4):
            for name in set(names) & set(targets):
                d_out, d_in = (d, f) if name == names[2] else (f, d)
                path = f"{prefix}.{module}.experts.{e}.{name}"
                tensors[f"{path}.lora_A.weight"] = draw(4, d_in)
                tensors[f"{path}.lora_B.weight"] = draw(d_out, 4)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=4, target_modules=targets)
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("more", [[], ["q_proj", "gate"]], ids=str)
@pytest.mark.parametrize("family", NAMES)
def test_files_of_single_experts_load_with_pefts_logits(family, more, tmp_path):
    per_expert_files(family, tmp_path, [*NAMES[family][1], *more])
    expected = hf_logits(peft_read(family, tmp_path))
    model = load_adapter(fast(family), tmp_path)
    assert difference(logits(model), expected, logits(fast(family))) <= 1e-5


@pytest.mark.parametrize("family", NAMES)
def test_gate_and_up_of_single_experts_load_alone(family, tmp_path):
    """PEFT puts these under the wrong wrapper; the experts merged by hand are the oracle."""
    module, names, (f, _) = NAMES[family]
    per_expert_files(family, tmp_path, names[:2])
    model = load_adapter(fast(family), tmp_path)
    file, expected = load_file(tmp_path / "adapter_model.safetensors"), hugging_face(family)
    with torch.no_grad():
        for i in range(2):
            for e in range(4):
                path = f"base_model.model.model.layers.{i}.{module}.experts.{e}"
                weight = expected.model.layers[i].mlp.experts.gate_up_proj[e]
                for name, rows in ((names[0], weight[:f]), (names[1], weight[f:])):
                    a, b = (file[f"{path}.{name}.lora_{s}.weight"] for s in "AB")
                    rows += 2 * b @ a
    assert difference(logits(model), hf_logits(expected), logits(fast(family))) <= 1e-5


def test_single_experts_that_are_missing_or_misshapen_are_named(tmp_path):
    per_expert_files("mixtral", tmp_path, ["w1", "w2", "w3"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.model.layers.1.block_sparse_moe.experts"
    del tensors[f"{prefix}.3.w2.lora_A.weight"]
    tensors[f"{prefix}.0.w1.lora_B.weight"] = torch.zeros(56, 5)
    tensors[f"{prefix}.4.w1.lora_B.weight"] = torch.zeros(56, 4)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as error:
        load_adapter(fast("mixtral"), tmp_path)
    for words in (
        f"missing     {prefix}.3.w2.lora_A.weight (4, 56)",
        f"shape       {prefix}.0.w1.lora_B.weight: file has (56, 5), the config says (56, 4)",
        f"unexpected  {prefix}.4.w1.lora_B.weight",
    ):
        assert words in str(error.value)


def test_wrong_shapes_of_fused_files_are_named(tmp_path):
    family, settings = EXPERT_CASES["both"]
    peft_saved(family, tmp_path, **settings)
    edit(tmp_path, r=5)
    with pytest.raises(CheckpointError, match=r"experts\.base_layer\.lora_A.*\(20, 32\)"):
        load_adapter(fast(family), tmp_path)
