"""Adapter folders that load_adapter refuses, each with the field or key that is wrong."""

import pytest
import torch

from fastlora.errors import CheckpointError
from fastlora.formats.peft.reading import load_adapter
from oracles.peft_cases import FORWARD
from oracles.peft_side import edit, fast, peft_saved, rewrite

REFUSED_FIELDS = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1},
    "monteclora_config": {"n": 1},
    "velora_config": {"n": 1},
    "use_bdlora": {"n": 1},
    "use_qalora": True,
    "layer_replication": [[0, 1], [0, 1]],
    "megatron_config": {"n": 1},
    "a_field_of_tomorrow": "on",
    "peft_type": "LOHA",
    "task_type": "SEQ_CLS",
    "init_lora_weights": "loftq",
    "r": "4",
    "lora_alpha": None,
    "target_modules": [1],
    "rank_pattern": ["q_proj"],
    "layers_to_transform": "0",
    "use_rslora": 1,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    peft_saved(FORWARD, folder, r=4, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture
def broken(saved, tmp_path):
    """A copy of a good adapter, to be broken."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_an_unsupported_config_field_is_refused_by_name(field, broken):
    edit(broken, **{field: REFUSED_FIELDS[field]})
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json[^§]*{field}="):
        load_adapter(fast(FORWARD), broken)


@pytest.mark.parametrize("init", ["pissa_niter_4", "loftq", "corda", "lora_ga", "nonsense"])
def test_initialisations_that_change_the_base_are_refused(init, broken):
    edit(broken, init_lora_weights=init)
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{init}'"):
        load_adapter(fast(FORWARD), broken)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(target_modules=["wq"]), "'wq'"),
        (dict(target_modules=["norm"]), "not a linear layer"),
        (dict(target_modules="("), "is not a regular expression"),
        (dict(r=0), "r=0"),
        (dict(rank_pattern={"q_proj": 2.5}), "rank_pattern"),
        (dict(target_modules=".*q_proj", layers_to_transform=[0]), "only filter a list"),
    ],
)
def test_impossible_settings_are_refused(fields, message, broken):
    edit(broken, **fields)
    with pytest.raises(CheckpointError) as refused:
        load_adapter(fast(FORWARD), broken)
    assert message in str(refused.value)


def test_all_wrong_fields_are_listed_at_once(broken):
    edit(broken, use_qalora=True, bias=3, r="x", peft_type="IA3")
    with pytest.raises(CheckpointError) as refused:
        load_adapter(fast(FORWARD), broken)
    for part in ("use_qalora", "bias", "r='x'", "IA3"):
        assert part in str(refused.value)


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def without_prefix(tensors):
    return {k.removeprefix("base_model.model."): t for k, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ts: {k: t for k, t in ts.items() if k != KEY}, f"missing     {KEY}"),
        (lambda ts: ts | {KEY.replace("v_proj", "k_proj"): ts[KEY].clone()}, "target_modules"),
        (lambda ts: ts | {"base_model.model.lm_head.weight": ts[KEY].clone()}, "lm_head.weight"),
        (lambda ts: ts | {KEY: ts[KEY][:-1].clone()}, f"shape       {KEY}"),
        (lambda ts: ts | {KEY: ts[KEY] * float("nan")}, f"NaN or inf  {KEY}"),
        (lambda ts: ts | {KEY: ts[KEY].to(torch.int32)}, f"dtype       {KEY}"),
        (lambda ts: ts | {f"_orig_mod.{KEY}": ts[KEY].clone()}, "twice"),
        (without_prefix, "PEFT's keys begin with 'base_model.model.'"),
    ],
)
def test_wrong_tensors_are_refused_by_key(change, message, broken):
    rewrite(broken, change)
    model = fast(FORWARD)
    with pytest.raises(CheckpointError) as refused:
        load_adapter(model, broken)
    assert message in str(refused.value)
    assert "adapter_model.safetensors" in str(refused.value)
    assert model.adapter is None


def test_a_rank_that_differs_from_the_file_is_refused(broken):
    edit(broken, r=8)
    with pytest.raises(CheckpointError, match=r"file has \(4, 32\), the config says \(8, 32\)"):
        load_adapter(fast(FORWARD), broken)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_cut_file_is_refused(kept, broken):
    path = broken / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        load_adapter(fast(FORWARD), broken)


def test_a_broken_config_is_refused(broken):
    (broken / "adapter_config.json").write_text('{"r": 4,')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_adapter(fast(FORWARD), broken)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(file, broken):
    (broken / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load_adapter(fast(FORWARD), broken)


def test_pickles_are_refused(broken):
    (broken / "adapter_model.safetensors").rename(broken / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        load_adapter(fast(FORWARD), broken)


def test_an_adapter_in_a_sub_folder_is_suggested(saved, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_bytes(
        (saved / "adapter_config.json").read_bytes()
    )
    with pytest.raises(FileNotFoundError, match=r"\['other'\]"):
        load_adapter(fast(FORWARD), tmp_path)


def test_smollm3_has_no_default_targets(broken):
    edit(broken, target_modules=None)
    with pytest.raises(CheckpointError, match="smollm3"):
        load_adapter(fast("smollm3"), broken)
