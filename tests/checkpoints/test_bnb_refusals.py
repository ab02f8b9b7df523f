"""Quantised folders that are broken, and settings that exclude a quantised base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastlora
from fastlora.errors import CheckpointError
from oracles.quantized_bases import load


def edited(folder: Path, to: Path, change: Any) -> Path:
    """A copy of a checkpoint whose tensors `change` has edited."""
    to.mkdir()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def _text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _without_offset(state: Tensor) -> Tensor:
    value = json.loads(state.numpy().tobytes())
    del value["nested_offset"]
    return _text(json.dumps(value))


def state_with(tensors: dict[str, Tensor], **changed: Any) -> None:
    state = json.loads(tensors[STATE].numpy().tobytes()) | changed
    tensors[STATE] = _text(json.dumps(state))


BROKEN = {
    "no statistics": (lambda t: t.pop(f"{Q}.absmax"), "absmax is missing"),
    "no state": (
        lambda t: t.pop(f"{Q}.quant_state.bitsandbytes__nf4"),
        "4 bits: expected the parts",
    ),
    "no bytes": (lambda t: t.pop(Q), "is missing, but its scales"),
    "a short absmax": (
        lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"][:-1].clone()}),
        "absmax: file has U8",
    ),
    "other levels": (
        lambda t: t.update({f"{Q}.quant_map": t[f"{Q}.quant_map"] * 2}),
        "quant_map is not nf4's",
    ),
    "another shape": (lambda t: state_with(t, shape=[32, 30]), "shape=.*30"),
    "another block": (lambda t: state_with(t, blocksize=48), "blocksize=48"),
    "another dtype": (lambda t: state_with(t, dtype="int4"), "dtype='int4'"),
    "an endless offset": (lambda t: state_with(t, nested_offset=float("inf")), "nested_offset=inf"),
    "too few bytes": (lambda t: t.update({Q: t[Q][:-1].clone()}), "expected 512 bytes"),
    "no JSON": (
        lambda t: t.update(
            {f"{Q}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}
        ),
        "is not a JSON object",
    ),
    "a norm": (
        lambda t: t.update({"model.norm.weight.absmax": torch.zeros(1)}),
        "unexpected  .*model.norm.weight.absmax",
    ),
    "a float for a size": (lambda t: state_with(t, shape=[32.0, 32.0]), r"shape=\[32.0"),
    "a float for a block": (lambda t: state_with(t, blocksize=64.0), "blocksize=64.0"),
    "true for a block": (lambda t: state_with(t, blocksize=True), "blocksize=True"),
    "an offset beyond float32": (lambda t: state_with(t, nested_offset=1e39), "nested_offset=1e"),
    "an endless integer": (lambda t: state_with(t, nested_offset=10**401), "nested_offset=1000"),
    "a foreign kind": (
        lambda t: t.update({f"{Q}.quant_state.bitsandbytes__int4": t.pop(STATE)}),
        "int4: expected the parts of nf4, fp4 or int8",
    ),
    "two kinds": (
        lambda t: t.update({f"{Q}.quant_state.bitsandbytes__fp4": t[STATE].clone()}),
        "mixed: expected the parts",
    ),
    "4 and 8 bits": (
        lambda t: t.update({Q.replace("weight", "SCB"): torch.ones(32)}),
        "mixed: expected the parts",
    ),
    "a scale that is not nested": (
        lambda t: t.update({STATE: _without_offset(t[STATE])}),
        "absmax: file has U8",
    ),
    "levels of another shape": (
        lambda t: t.update({f"{Q}.quant_map": 2 * t[f"{Q}.quant_map"][:, None]}),
        "quant_map: file has F32",
    ),
    "a name twice": (
        lambda t: t.update({STATE: _text('{"blocksize": 64, "blocksize": 128}')}),
        "is not a JSON object",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_statistics_are_refused_by_key(case, quantised_folder, tmp_path):
    change, message = BROKEN[case]
    folder = edited(quantised_folder("nf4 nested"), tmp_path / "broken", change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_all_broken_weights_are_listed_at_once(quantised_folder, tmp_path):
    def change(tensors):
        for key in [k for k in tensors if k.endswith(".absmax") and "nested" not in k][:3]:
            del tensors[key]

    with pytest.raises(CheckpointError) as error:
        load(edited(quantised_folder("nf4 nested"), tmp_path / "broken", change))
    assert str(error.value).count("absmax is missing") == 3


def test_a_broken_int8_checkpoint_is_refused_by_key(quantised_folder, tmp_path):
    path = "model.layers.0.self_attn.q_proj"
    drop = lambda t: t.pop(f"{path}.SCB")
    with pytest.raises(CheckpointError, match="SCB is missing"):
        load(edited(quantised_folder("int8"), tmp_path / "a", drop))
    for i, value in enumerate((torch.tensor(2, dtype=torch.uint8), torch.tensor(float("nan")))):
        formatted = lambda t, value=value: t.update({f"{path}.weight_format": value})
        with pytest.raises(CheckpointError, match="weight_format"):
            load(edited(quantised_folder("int8"), tmp_path / f"b{i}", formatted))
    for i, change in enumerate(
        (
            lambda t: t.update({f"{path}.SCB": t[f"{path}.SCB"][:, None]}),
            lambda t: t.update({f"{path}.weight": t[f"{path}.weight"].flatten()}),
        )
    ):
        with pytest.raises(CheckpointError, match="file has"):
            load(edited(quantised_folder("int8"), tmp_path / f"c{i}", change))


def test_a_config_of_other_weights_is_refused(dense_folder, quantised_folder, tmp_path):
    folder = edited(dense_folder(), tmp_path / "mixed", lambda t: None)
    (folder / "config.json").write_text(
        (quantised_folder("nf4 nested") / "config.json").read_text()
    )
    with pytest.raises(CheckpointError, match="no weight is quantised"):
        load(folder)


def test_unsupported_4_bit_loads_are_refused_before_any_work(dense_folder, monkeypatch):
    with pytest.raises(ValueError, match="float64"):
        load(dense_folder(), load_in_4bit=True, dtype="float64")
    with pytest.raises(ValueError, match="mixtral: experts stay in 16 bits"):
        load(dense_folder("mixtral"), load_in_4bit=True)
    with pytest.raises((ValueError, TypeCheckError), match="load_in_4bit"):
        load(dense_folder(), load_in_4bit=1)
    from fastlora.ops.quant import bitsandbytes as quantized

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(quantized, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes"):
        load(dense_folder(), load_in_4bit=True)


def test_arguments_that_exclude_a_quantised_base_are_refused_by_name(dense_folder):
    model = load(dense_folder(), load_in_4bit=True)
    for wrong, message in (
        (dict(qat_scheme="int8"), "qat_scheme='int8': this base is already quantised"),
        (
            dict(modules_to_save=["q_proj"], target_modules=["v_proj"]),
            "modules_to_save: model.layers.0.self_attn.q_proj.weight is quantised",
        ),
        (
            dict(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 2}),
            "loftq_iter",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fastlora.lora(model, **wrong)
