"""Random changes of JSON fields and file headers load or are refused."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastlora
from oracles.hostile import (
    CONFIG,
    HUGE,
    READ_OF_MODEL,
    WEIGHTS,
    header_file,
    load,
    loads_or_refuses,
    runs,
)

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**40, HUGE, -HUGE, 1e308, float("nan"), float("inf")])
TEXTS = st.text(max_size=5) | st.sampled_from(["\ud800", "\0", "q_proj", ".*", "(", "F32", "yarn"])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


def test_any_field_of_an_adapters_config(adapter, broken_adapter, model):
    raw = json.loads((adapter / CONFIG).read_text())
    more = ("exclude_modules", "use_dora", "alora_invocation_tokens", "lora_bias")

    @FUZZ
    @given(st.dictionaries(st.sampled_from([*raw, *more]) | TEXTS, JSON, min_size=1, max_size=2))
    def check(changed):
        (broken_adapter / CONFIG).write_text(json.dumps(raw | changed))
        loads_or_refuses(lambda: fastlora.load_adapter(model, broken_adapter))
        loads_or_refuses(lambda: load(broken_adapter)) if "r" in changed else None

    check()


@pytest.mark.parametrize("name", READ_OF_MODEL)
def test_any_field_of_a_models_json(folder, broken_model, name):
    raw = json.loads((folder / name).read_text())
    known = {
        "tokenizer_config.json": ["bos_token", "added_tokens_decoder", "extra_special_tokens"],
        "config.json": ["rope_scaling", "layer_types", "sliding_window", "tokenizer_class"],
        "generation_config.json": ["eos_token_id", "pad_token_id"],
        "tokenizer.json": [],
    }
    keys = st.sampled_from([*raw, *known[name]])

    @settings(FUZZ, max_examples=80)
    @given(st.dictionaries(keys, JSON, min_size=1, max_size=2))
    def check(changed):
        (broken_model / name).write_text(json.dumps(raw | changed))
        loads_or_refuses(lambda: runs(broken_model))

    check()


def mutated(header: dict):
    """A header with one field of one tensor replaced, a tensor dropped, renamed or doubled."""
    tensors = st.sampled_from(sorted(header))
    field = st.sampled_from(["dtype", "shape", "data_offsets", "more"])
    value = JSON | st.lists(st.integers(-1, 2**63) | st.integers(0, 300), max_size=3)
    dtype = st.sampled_from(["F32", "F16", "F64", "BF16", "I8", "F8_E4M3", "F4", "BOOL", "U64"])
    set_field = lambda key, f, v: {**header, key: {**header[key], f: v}}
    drop = lambda key: {k: v for k, v in header.items() if k != key}
    return (
        st.builds(set_field, tensors, field, value)
        | st.builds(lambda key, d: set_field(key, "dtype", d), tensors, dtype)
        | tensors.map(drop)
        | st.builds(lambda key, name: {**drop(key), name: header[key]}, tensors, TEXTS)
        | st.builds(lambda key, name: {**header, name: header[key]}, tensors, TEXTS)
        | st.builds(lambda key, v: {**header, key: v}, tensors, JSON)
    )


def test_any_header(adapter, broken_adapter, model):
    data = (adapter / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = {k: v for k, v in json.loads(data[8:start]).items() if k != "__metadata__"}

    @FUZZ
    @given(mutated(header))
    def structured(changed):
        header_file(broken_adapter / WEIGHTS, json.dumps(changed).encode(), data[start:])
        loads_or_refuses(lambda: fastlora.load_adapter(model, broken_adapter))

    @FUZZ
    @given(st.binary(max_size=12), st.integers(0, start + 8), st.booleans())
    def raw(junk, at, insert):
        rest = data[at if insert else at + len(junk) :]
        (broken_adapter / WEIGHTS).write_bytes(data[:at] + junk + rest)
        loads_or_refuses(lambda: fastlora.load_adapter(model, broken_adapter))

    structured()
    raw()
