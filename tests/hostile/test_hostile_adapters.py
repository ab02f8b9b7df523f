"""Hostile adapter folders load right or are refused by file within a second, and change nothing.

Broken files one by one are in checkpoints/test_broken_files.py, models/test_config_refusals.py and
formats/test_peft_refusals.py. Here they pass through `fastlora.load` and `fastlora.load_adapter`.
"""

import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.errors import CheckpointError
from fastlora.models.names import module_names
from oracles.hostile import (
    BASE_WEIGHTS,
    CONFIG,
    HUGE,
    INDEX,
    READ_OF_MODEL,
    WEIGHTS,
    edit,
    header_file,
    load,
    loads_or_refuses,
    refused,
)


def rewrite(path: Path, change) -> None:
    save_file(change(load_file(path)), path)


# ── JSON of every file ────────────────────────────────────────────────────────────────────


BAD_JSON = {
    "10,000 deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "100,000 lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "cut off": b'{"a": ',
    "no UTF-8": b'{"a": "\xff"}',
    "NUL": b'{"a": "\0"}',
    "5,000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "a list": b"[1]",
}


@pytest.mark.parametrize("name", READ_OF_MODEL)
@pytest.mark.parametrize("bad", BAD_JSON)
def test_bad_json_in_a_model_is_refused_by_name(broken_model, name, bad):
    (broken_model / name).write_bytes(BAD_JSON[bad])
    refused(lambda: load(broken_model), name)


@pytest.mark.parametrize("bad", [*BAD_JSON, "a name twice"])
def test_bad_json_in_an_adapter_is_refused_by_name(broken_adapter, model, bad):
    (broken_adapter / CONFIG).write_bytes(BAD_JSON.get(bad, b'{"r": 1, "r": 2}'))
    refused(lambda: fastlora.load_adapter(model, broken_adapter), CONFIG)


@pytest.mark.parametrize("name", ["config.json", CONFIG, INDEX])
def test_50_megabytes_of_json_are_refused_unread(broken_model, broken_adapter, model, name):
    folder = broken_adapter if name == CONFIG else broken_model
    (broken_model / BASE_WEIGHTS).unlink()
    (folder / name).write_bytes(b'{"a": "' + b"x" * 50_000_000 + b'"}')
    call = {CONFIG: lambda: fastlora.load_adapter(model, folder)}.get(name, lambda: load(folder))
    assert "50,000,009 bytes" in refused(call, name)


def test_a_name_given_20_000_times_over_is_refused_in_a_moment(broken_adapter, model):
    pairs = b",".join(b'"k%d":1' % (i // 2) for i in range(20_000))
    (broken_adapter / CONFIG).write_bytes(b"{" + pairs + b"}")
    refused(lambda: fastlora.load_adapter(model, broken_adapter), CONFIG, "given twice")


# ── adapter_config.json ───────────────────────────────────────────────────────────────────


BAD_FIELDS = [
    dict(peft_type="lora"),
    dict(peft_type=["LORA"]),
    dict(task_type={}),
    dict(r=-4),
    dict(r=True),
    dict(r=10**9),
    dict(r=HUGE, lora_alpha=1.5),
    dict(r=HUGE, use_rslora=True),
    dict(rank_pattern={"q_proj": HUGE}),
    dict(lora_alpha=HUGE),
    dict(lora_alpha=float("nan")),
    dict(lora_alpha=float("inf")),
    dict(alpha_pattern={"q_proj": HUGE}),
    dict(alpha_pattern={"q_proj": float("nan")}),
    dict(lora_dropout=2.0),
    dict(lora_dropout=HUGE),
    dict(lora_dropout=float("nan")),
    dict(target_modules=5),
    dict(target_modules={"q_proj": 1}),
    dict(target_modules=[1, 2]),
    dict(target_modules=[]),
    dict(target_modules=""),
    dict(target_modules=["q_proj\0"]),
    dict(target_modules="\ud800"),
    dict(target_modules=["x" * 10**6]),
    dict(target_modules=["q_proj"] * 10**5),
    dict(target_modules="(" * 5000 + ")" * 5000),
    dict(target_modules="a{99999999999999999999}"),
    dict(exclude_modules="(" * 5000),
    dict(layers_to_transform=[HUGE]),
    dict(layers_to_transform=list(range(10**6))),
    dict(layers_pattern="model|x", layers_to_transform=[0]),
    dict(layers_pattern="(?#", layers_to_transform=[0]),
    dict(init_lora_weights={"a": 1}),
    dict(a_field_of_tomorrow="x" * 10**6),
    {f"field_{i}": 1 for i in range(10**4)},
]


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=lambda fields: f"{fields!r:.40}")
def test_a_bad_field_is_refused_by_name(broken_adapter, model, fields):
    edit(broken_adapter / CONFIG, **fields)
    refused(lambda: fastlora.load_adapter(model, broken_adapter), CONFIG, next(iter(fields)))


def test_a_literal_beyond_floats_is_infinity(broken_adapter, model):
    text = (broken_adapter / CONFIG).read_text()
    (broken_adapter / CONFIG).write_text(re.sub(r'"lora_alpha": \d+', '"lora_alpha": 1e400', text))
    refused(lambda: fastlora.load_adapter(model, broken_adapter), "lora_alpha=inf")


BAD_NAMES = ["\ud800", "a\0b", "x" * 5000, "/" + "x" * 300, "a/" * 3000, "", ".", "~", "../..", 5]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: f"{name!r:.20}")
def test_a_bad_name_of_the_base_is_refused(broken_adapter, name):
    edit(broken_adapter / CONFIG, base_model_name_or_path=name)
    refused(lambda: load(broken_adapter))


# ── patterns ──────────────────────────────────────────────────────────────────────────────


CATASTROPHES = [
    "(a+)+$",
    r"([\w.]+)+!",
    "(.|.)*!",
    "(?:a|ab|.)*!",
    "(?:.*)*!",
    ".*" * 9 + "!",
    ".?" * 40 + "!",
    "(?i)" + "".join(rf"(?:{c}\B|{c.upper()}\B|.\B)?" for c in "modelayrs" * 3) + "!",
    r"(?=(.|.)*!)q_proj",
    r"(.)(\1|.)*!",
]

# Unsloth's, PEFT's documentation's and the Hub's.
EVERYDAY = [
    r".*\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    r"^(?!.*vision).*(?:q_proj|v_proj)$",
    r"(.*\.)?(model\.)?layers\.(0|1)\.(self_attn|mlp)\.(?:[a-z]+_)?proj|.*q_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|o_proj)))",
]


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
@pytest.mark.parametrize("regex", CATASTROPHES, ids=lambda regex: regex[:20])
def test_a_catastrophic_pattern_is_matched_or_refused_at_once(broken_adapter, model, regex, field):
    edit(broken_adapter / CONFIG, **{field: {regex: 2} if field == "rank_pattern" else regex})
    loads_or_refuses(lambda: fastlora.load_adapter(model, broken_adapter))


def test_a_pattern_that_takes_too_long_is_refused_by_name(broken_adapter, model, monkeypatch):
    monkeypatch.setattr("fastlora.adapters.patterns._REGEX_SECONDS", 0.2)
    edit(broken_adapter / CONFIG, target_modules=r"(.*?)*(.*?)*(?(1)Z|Y)")
    refused(lambda: fastlora.load_adapter(model, broken_adapter), "target_modules", "too long")


@pytest.mark.parametrize("regex", EVERYDAY, ids=lambda regex: regex[:20])
def test_everyday_patterns_are_read(broken_adapter, model, regex):
    edit(broken_adapter / CONFIG, target_modules=regex)
    try:
        fastlora.load_adapter(model, broken_adapter)
    except CheckpointError as error:  # it targets more than the file has
        assert "missing" in str(error)


def test_a_thousand_full_names_are_read(broken_adapter, model):
    names = [m for m in module_names(model.spec.config) if m.endswith(("q_proj", "v_proj"))]
    names += [f"model.layers.{i}.self_attn.q_proj" for i in range(100, 1100)]
    edit(broken_adapter / CONFIG, rank_pattern={re.escape(n): 2 for n in names})
    fastlora.load_adapter(model, broken_adapter)


# ── adapter_model.safetensors ─────────────────────────────────────────────────────────────


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def test_every_length_of_a_cut_file_is_refused(broken_adapter, model):
    path = broken_adapter / WEIGHTS
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for length in [*range(start + 9), *range(start + 9, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=re.escape(WEIGHTS)):
            fastlora.load_adapter(model, broken_adapter)


ONE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'

BAD_FILES = {
    "garbage": lambda p: p.write_bytes(os.urandom(64)),
    "a pickle": lambda p: p.write_bytes(pickle.dumps({"a": 1})),
    "length 2^60": lambda p: header_file(p, b"{}", size=2**60),
    "shape 2^40": lambda p: header_file(p, b"{%s}" % ONE.replace(b"[1]", b"[%d]" % 2**40), b"0000"),
    "twice": lambda p: header_file(p, b"{%s,%s}" % (ONE, ONE), b"0000"),
    "overlapping": lambda p: header_file(p, b"{%s,%s}" % (ONE, ONE.replace(b"a", b"b")), b"0000"),
    "a surrogate": lambda p: header_file(p, b"{%s}" % ONE.replace(b'"a"', rb'"\ud800"'), b"0000"),
    "four bits": lambda p: header_file(
        p, b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}', b"0000"
    ),
    "a gigabyte's header": lambda p: (header_file(p, b"{", size=10**9), os.truncate(p, 2 * 10**9)),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_is_refused_by_name(broken_adapter, model, bad):
    path = broken_adapter / WEIGHTS
    path.unlink()  # not written in place, because `adapter` may be mapped
    BAD_FILES[bad](path)
    refused(lambda: fastlora.load_adapter(model, broken_adapter), WEIGHTS)


BAD_TENSORS = {
    "int8": lambda x: x.to(torch.int8),
    "fp8": lambda x: x.to(torch.float8_e4m3fn),
    "complex": lambda x: x.to(torch.complex64),
    "inf": lambda x: x + float("inf"),
    "nan in one place": lambda x: torch.where(torch.arange(x.shape[1]) == 1, float("nan"), x),
    "transposed": lambda x: x.T.contiguous(),
    "no rows": lambda x: x[:0].clone(),
    "no dimension": lambda x: x.sum(),
    "three dimensions": lambda x: x[None].clone(),
}


@pytest.mark.parametrize("bad", BAD_TENSORS)
def test_a_bad_tensor_is_refused_by_key(broken_adapter, model, bad):
    rewrite(broken_adapter / WEIGHTS, lambda ts: ts | {KEY: BAD_TENSORS[bad](ts[KEY])})
    refused(lambda: fastlora.load_adapter(model, broken_adapter), WEIGHTS, KEY)


def test_ten_of_thousands_of_unexpected_keys_are_shown(broken_adapter, model):
    more = {f"base_model.model.x{i}.lora_A.weight": torch.zeros(1) for i in range(3000)}
    rewrite(broken_adapter / WEIGHTS, lambda ts: ts | more)
    text = refused(lambda: fastlora.load_adapter(model, broken_adapter), WEIGHTS, "2990 more")
    assert len(text.splitlines()) == 13


@pytest.mark.parametrize("rename", [("model.model.", "_orig_mod.model.model."), (".weight", "!")])
def test_a_compiled_models_and_a_named_adapters_keys_mean_the_same(broken_adapter, model, rename):
    old, new = rename[0], rename[1].replace("!", ".default.weight")
    good = fastlora.load_adapter(model, broken_adapter)
    rewrite(broken_adapter / WEIGHTS, lambda ts: {k.replace(old, new): t for k, t in ts.items()})
    again = fastlora.load_adapter(model, broken_adapter)
    pairs = zip(tree_leaves(good.adapter), tree_leaves(again.adapter), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_pickle_beside_the_weights_is_not_opened(broken_adapter, broken_model, model, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for path in (broken_adapter / "adapter_model.bin", broken_model / "pytorch_model.bin"):
        path.write_bytes(pickle.dumps(Bomb()))
    fastlora.load_adapter(model, broken_adapter)
    load(broken_model)
    for path in (broken_adapter / WEIGHTS, broken_model / BASE_WEIGHTS):
        path.write_bytes(pickle.dumps(Bomb()))
    refused(lambda: fastlora.load_adapter(model, broken_adapter), WEIGHTS)
    refused(lambda: load(broken_model), BASE_WEIGHTS)
    assert not (tmp_path / "executed").exists()


def test_a_refusal_does_not_change_the_model(broken_adapter, adapter, model):
    carrying = fastlora.load_adapter(model, adapter)
    leaves = tree_leaves((carrying.base, carrying.adapter))
    before, spec, held = [x.clone() for x in leaves], carrying.spec, carrying.adapter
    for change in (lambda x: x * float("nan"), lambda x: x[:0].clone(), lambda x: x.to(torch.int8)):
        rewrite(broken_adapter / WEIGHTS, lambda ts, to=change: ts | {KEY: to(ts[KEY].float())})
        refused(lambda: fastlora.load_adapter(carrying, broken_adapter), KEY)
        shutil.copy(adapter / WEIGHTS, broken_adapter / WEIGHTS)
    after = tree_leaves((carrying.base, carrying.adapter))
    assert carrying.spec is spec and carrying.adapter is held
    assert all(a is b for a, b in zip(leaves, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
