"""plan(): predictions against measurements by bench.py, the choice, and refusals."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

import fastlora
from fastlora.distributed.cost import Cluster
from fastlora.model import Model
from fastlora.models.config_json import config_from_json
from fastlora.models.names import base_from_tensors, base_tensors, projection_weights
from fastlora.models.spec import Spec
from fastlora.ops.quant.weights import NestedAbsmax, Weight4bit, WeightFP8, empty_form
from fastlora.training.planning.layers import layers_of
from fastlora.training.planning.memory import base_bytes, peak_bytes
from fastlora.training.planning.plan import CHOICES, plan
from fastlora.training.planning.ranks import layouts_of, transfers
from fastlora.training.planning.time import (
    Work,
    _backward,
    _forward,
    _seconds,
    _widths,
    forward_seconds,
    step_seconds,
)
from oracles.pairs import adapted

# Rows of scripts/bench.py with the kernels on: one recompute policy each, as `run` and figures.
MEASURED_ROWS = Path(__file__).parents[1] / "data" / "planning_rows.jsonl"
# Run -> bytes per parameter of the adapter that it held beside what a step of bench.py needs now:
# train and host_shards.py keep the given adapter, and an older benchmark the old gradients while it
# computed new ones. None: in this run the backward pass held one more tensor of the MLP's width, so
# only the times are compared.
MEASURED: dict[str, int | None] = {
    "2026-11-26-h200-1b": 4,
    "2026-11-26-h200-8b": 4,
    "2026-11-26-8b-nf4": 0,
    "2026-11-26-1b": None,
    "2026-11-26-8b": None,
    "2026-11-29-h200": 0,
    "2026-11-27-h100-lengths": 0,
    "2026-11-30-h200": 0,
    "2026-11-30-h200-lengths": 0,
    "2026-11-30-h200-nf4": 0,
    "2026-11-30-8b-fp8": 0,
    "2026-11-30-h200-train": 4,
    "2026-11-30-h200-copies": 4,
    "2026-11-30-h200-host-shards": 4,
}
_70B = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, head_dim=128)
SHAPES = {
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128),
    "70b": _70B | dict(num_attention_heads=64),
}


def in_4bit(shape: tuple[int, ...]) -> Weight4bit:
    """A record of a matrix, without its bytes."""
    new = lambda n, dtype=torch.float32: torch.empty(n, dtype=dtype, device="meta")
    blocks = shape[0] * shape[1] // 64
    absmax = NestedAbsmax(new(blocks, torch.uint8), new(blocks // 256), new(256), new(()))
    form = empty_form((shape[0], shape[1]), torch.bfloat16, "meta")
    return Weight4bit(new(32 * blocks, torch.uint8), new(16), form, absmax)


def in_fp8(shape: tuple[int, ...]) -> WeightFP8:
    """The same of a matrix in e4m3."""
    values = torch.empty(shape, dtype=torch.uint8, device="meta")
    return WeightFP8(values, torch.empty(shape[0], device="meta"))


@cache
def shaped(name: str, *, quantised: bool = False, fp8: bool = False) -> Model:
    """A Llama of a real size with r = 16 on all projections; none of its weights are there."""
    config = config_from_json(
        dict(
            model_type="llama",
            vocab_size=128256,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=name == "1b",
            dtype="bfloat16",
            max_position_embeddings=131072,
        )
        | SHAPES[name]
    )
    packed = {*projection_weights(config)} if quantised or fp8 else set()
    record = in_fp8 if fp8 else in_4bit
    new = lambda shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
    tensors: dict[str, Any] = {
        n: record(s) if n in packed else new(s) for n, s in base_tensors(config).items()
    }
    spec = Spec(config=config, name_or_path=name, max_seq_length=131072)
    model = Model(spec=spec, base=base_from_tensors(config, tensors))
    return fastlora.lora(model, r=16)


def measured_model(row: dict[str, Any]) -> Model:
    """The model of a row."""
    quantised, fp8 = row.get("load_in_4bit", False), row.get("base_precision") == "fp8"
    model = shaped(row["shape"], quantised=quantised, fp8=fp8)
    how: dict[str, Any] = {}
    if "targets" in row:
        how["target_modules"] = tuple(row["targets"])
    if "dropout" in row:
        how["lora_dropout"] = row["dropout"]
    return fastlora.lora(without_adapter(model), r=16, **how) if how else model


def rows() -> list[tuple[str, dict[str, Any]]]:
    """(run, row) of every measured step."""
    found = [json.loads(line) for line in MEASURED_ROWS.read_text().splitlines()]
    return [(row["run"], row) for row in found]


ROWS = rows()


def name_of(run: str, row: dict[str, Any]) -> str:
    keys = ("dropout", "targets", "load_in_4bit", "shard", "seq")
    more = [str(row[key]) for key in keys if key in row]
    return " ".join([run, row["shape"], row["setting"], *more])


@pytest.mark.parametrize(("run", "row"), ROWS, ids=[name_of(*x) for x in ROWS])
def test_predictions_are_near_the_measurements(run, row):
    model, shard = measured_model(row), row.get("shard", 1)
    setting: Any = float(row["setting"]) if row["setting"][0].isdigit() else row["setting"]
    b, t = row.get("batch", 4), row.get("seq", 2048)
    cluster = Cluster(devices=1 if shard == "host" else shard)
    (layout,), base = layouts_of(shard, cluster), base_bytes(model)
    if (held := MEASURED[run]) is not None:
        # The benchmark steps the model's adapter itself, in float32; `train` steps a copy of it.
        held -= 4
        peak = peak_bytes(model, setting, b, t, "adamw", *layout, base)
        peak += held * model.num_parameters(trainable=True)
        assert peak / 2**30 == pytest.approx(row["peak_gib"], rel=0.013)
    computed = step_seconds(model, setting, b, t)
    seconds = transfers(model, b, t, computed, layout, cluster, base)["step_seconds"]
    if "replicated_ms" in row:  # a warm card: only the quotient to the whole base is compared
        assert seconds / computed == pytest.approx(row["ms"] / row["replicated_ms"], rel=0.02)
    else:
        assert 1e3 * seconds == pytest.approx(row["ms"], rel=0.08)


def test_the_measured_rows_cover_all_kinds_of_base():
    assert len(ROWS) >= 30 and {row["shape"] for _, row in ROWS} == {"1b", "8b", "70b"}
    assert {row.get("shard", 1) for _, row in ROWS} == {1, 2, "host"}
    assert {row.get("load_in_4bit", row.get("base_precision")) for _, row in ROWS} == {
        *(None, True, "fp8"),
    }


def test_less_memory_never_costs_less_time():
    model = shaped("8b")
    # Not "selective", which is between two numbers, nor "offload", which also uses host memory.
    shares = [x for x in CHOICES if x not in ("selective", "offload")]
    peaks = [peak_bytes(model, x, 4, 2048) for x in shares]
    times = [step_seconds(model, x, 4, 2048) for x in shares]
    assert peaks == sorted(peaks, reverse=True) and times == sorted(times)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ("80GB", "none"),
        ("48GB", 0.7),
        ("36GB", 0.3),
        ("24GB", "offload"),
        ("20GiB", "offload"),
    ],
)
def test_the_fastest_policy_that_fits_is_chosen(memory, expected):
    found = plan(shaped("8b"), 4, 2048, memory, card="H100")
    assert found.recompute == found.chosen.recompute
    if isinstance(expected, float):
        assert isinstance(found.recompute, float) or found.recompute == "selective"
    else:
        assert found.recompute == expected
    assert found.chosen.peak_bytes < found.memory
    faster = [x for x in found.options if x.step_seconds < found.chosen.step_seconds]
    assert all(1.06 * x.peak_bytes + 0.6 * 2**30 > found.memory for x in faster)


def test_a_batch_that_does_not_fit_is_refused_with_the_memory_it_needs():
    with pytest.raises(
        ValueError, match=r"11\.2 GiB: even recompute='offload' needs 1[67]\.\d+ GiB"
    ):
        plan(shaped("8b"), 4, 2048, "12GB")
    assert plan(shaped("8b", quantised=True), 1, 2048, "12GB").chosen.step_seconds is None
    assert plan(shaped("8b", quantised=True), 1, 2048, "12GB").recompute not in (
        "none",
        "selective",
    )


def test_8_bit_moments_are_counted():
    model = shaped("8b")
    less = peak_bytes(model, "full", 1, 64) - peak_bytes(model, "full", 1, 64, "adamw_8bit")
    assert less == pytest.approx(5.9 * model.num_parameters(trainable=True), rel=0.01)


def test_a_wide_rank_runs_without_the_kernel():
    model = shaped("1b")
    wide = fastlora.lora(without_adapter(model), r=64)
    more = peak_bytes(wide, "none", 4, 2048) - peak_bytes(model, "none", 4, 2048)
    assert more > 16 * 8192 * 8192 * 2


def test_bad_arguments_and_unmeasured_models_are_refused_by_name(pair):
    model = shaped("1b")
    for given, message in (
        (dict(batch_size=0), "batch_size=0"),
        (dict(seq_length=2.0), r"seq_length=2\.0"),
        (dict(seq_length=10**6), "max_seq_length"),
        (dict(memory="lots"), "memory='lots'"),
        (dict(memory=None), "memory=None"),
        (dict(memory=-1), "memory=-1"),
        (dict(optimizer="sgd"), "optimizer='sgd'"),
        (dict(card="T4"), "card='T4'"),
    ):
        with pytest.raises((ValueError, TypeCheckError), match=message.partition("=")[0]):
            plan(model, **(dict(batch_size=1, seq_length=8, memory="24GB") | given))
    tiny = pair("llama2").model
    with pytest.raises(ValueError, match="no adapter"):
        plan(tiny, 1, 8, "24GB")
    for settings, message in (
        (dict(use_dora=True), "use_dora"),
        (dict(trainable_token_indices=[1]), "outside the projections"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(adapted(tiny, r=2, **settings), 1, 8, "24GB")
    with pytest.raises(ValueError, match="mixture of experts"):
        plan(adapted(pair("mixtral").model, r=2), 1, 8, "24GB")


def without_adapter(model: Model) -> Model:
    return Model(spec=model.spec, base=model.base).with_adapter(None)


def test_layers_before_the_first_adapter_have_no_backward_pass():
    every = shaped("8b")
    last = fastlora.lora(without_adapter(every), r=16, finetune_last_n_layers=8)
    assert [x.trained for x in layers_of(last, "none", 64)] == 24 * [False] + 8 * [True]
    forward = forward_seconds(every, 4, 2048)
    saved = step_seconds(every, "none", 4, 2048) - step_seconds(last, "none", 4, 2048)
    assert saved == pytest.approx(
        24 / 32 * (step_seconds(every, "none", 4, 2048) - forward), rel=0.1
    )
    kept = peak_bytes(every, "none", 4, 2048) - peak_bytes(last, "none", 4, 2048)
    assert kept > 0.7 * (peak_bytes(every, "none", 4, 2048) - peak_bytes(every, "full", 4, 2048))


def test_gate_and_up_as_one_matrix_in_4_bits_run_without_the_kernel(pair):
    model = fastlora.lora(pair("phi3", torch.bfloat16).model, r=2)
    assert all(layer.fused for layer in layers_of(model, "none", 64))
    layers = tuple(
        {**x, "gate_up_proj": {"weight": in_4bit(tuple(x["gate_up_proj"]["weight"].shape))}}
        for x in model.base["layers"]
    )
    packed = replace(model, base={**model.base, "layers": layers})
    assert not any(layer.fused for layer in layers_of(packed, "none", 64))


def test_rounding_in_e4m3_is_a_part_of_both_passes():
    """A profile of four layers of 8B: 3.21 ms for rows, 0.475 ms for matrices. The kernel has since
    gone from 352 to 212 us for the gradients of gate and up."""
    model = shaped("8b", fp8=True)
    w, layer = _widths(model, 2048), layers_of(model, "none", 8192)[0]
    rounding = lambda x: _seconds(model, Work(rounded=x.rounded, turned=x.turned), 8192)
    forward, backward = rounding(_forward(w, layer)), rounding(_backward(w, layer))
    assert 4e3 * (forward + backward) == pytest.approx(3.21 - 4 * 0.14 + 0.475, rel=0.02)
    assert 0.25 < forward / (forward + backward) < 0.4
    exact = _seconds(model, _forward(w, layer)._replace(rounded=0), 8192)
    assert forward_seconds(model, 4, 2048) == pytest.approx(32 * (exact + forward))


def test_nothing_is_run_or_changed(pair):
    model = adapted(pair("llama2").model, r=2)
    before = [x.clone() for x in model.adapter["layers"][0]["q_proj"]]
    found = plan(model, 2, 16, "1GB")
    assert found.recompute == "none"
    assert all(map(torch.equal, before, model.adapter["layers"][0]["q_proj"]))
    assert all(isinstance(x, Tensor) and not x.requires_grad for x in before)
