"""Hostile model folders: settings, tokenizers, shards, links and chat templates."""

import json
import os
from pathlib import Path

import pytest

from fastlora.errors import CheckpointError
from oracles.hostile import BASE_WEIGHTS, HUGE, INDEX, bounded, edit, load, refused, runs

# ── model folders ─────────────────────────────────────────────────────────────────────────

BAD_SETTINGS = [
    dict(num_hidden_layers=10**9),
    dict(num_hidden_layers=HUGE),
    dict(hidden_size=2**40),
    dict(vocab_size=2**31 - 1),
    dict(head_dim=-2),
    dict(rms_norm_eps=float("nan")),
    dict(rope_scaling={"rope_theta": HUGE}),
    dict(rope_scaling={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}),
    dict(rope_scaling={"rope_type": []}),
    dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, head_dim=2),
    dict(tokenizer_class=[1]),
    dict(eos_token_id=["x"] * 10**5),
    dict(model_type="\ud800"),
]


@pytest.mark.parametrize("fields", BAD_SETTINGS, ids=lambda fields: f"{fields!r:.40}")
def test_a_bad_setting_is_refused(broken_model, fields):
    edit(broken_model / "config.json", **fields)
    refused(lambda: load(broken_model), str(broken_model.name))


BAD_WORDS = [
    dict(tokenizer_class=7),
    dict(eos_token="\ud800"),
    dict(eos_token={"content": "x", "lstrip": 3}),
    dict(extra_special_tokens=True),
    dict(additional_special_tokens=["\ud800"]),
    dict(added_tokens_decoder={"²": "x"}),
    dict(added_tokens_decoder={"9" * 5000: "x"}),
    dict(added_tokens_decoder={"1": {"content": "x", "special": "y"}}),
    dict(chat_template="\ud800"),
]


@pytest.mark.parametrize("fields", BAD_WORDS, ids=lambda fields: f"{fields!r:.40}")
def test_a_bad_tokenizer_setting_is_refused(broken_model, fields):
    edit(broken_model / "tokenizer_config.json", **fields)
    refused(lambda: load(broken_model), "tokenizer_config.json")


def test_ids_of_added_tokens_are_numbers(broken_model):
    (broken_model / "added_tokens.json").write_text('{"a": []}')
    refused(lambda: load(broken_model), "added_tokens.json")


def in_shards(folder: Path, file: str, key: str = "a", count: int = 1) -> None:
    (folder / BASE_WEIGHTS).rename(folder / "1.safetensors")
    weight_map = {f"{key}{i}": file.replace("#", str(i)) for i in range(count)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "file",
    ["../1.safetensors", "/1.safetensors", "a/../../1.safetensors", "x" * 5000 + ".safetensors"],
    ids=lambda file: file[:20],
)
def test_an_index_that_leads_elsewhere_is_refused(broken_model, file):
    in_shards(broken_model, file)
    with bounded(), pytest.raises(CheckpointError, match=INDEX):
        load(broken_model)


@pytest.mark.parametrize(
    "file", ["\ud800.safetensors", "#.safetensors", "1.safetensors/.safetensors", ".safetensors"]
)
def test_shards_with_invalid_names_are_reported_missing(broken_model, file):
    in_shards(broken_model, file, count=10_000)
    with bounded(), pytest.raises(FileNotFoundError) as error:
        load(broken_model)
    assert INDEX in str(error.value) and len(str(error.value)) < 2000


def test_links_are_followed_wherever_they_lead(broken_model, tmp_path):
    """huggingface_hub's cache is made of links that leave the folder: ../../blobs/…"""
    blob = tmp_path / "blob"
    (broken_model / BASE_WEIGHTS).rename(blob)
    (broken_model / BASE_WEIGHTS).symlink_to(blob)
    runs(broken_model)


@pytest.mark.parametrize("kind", ["loop", "dangling", "folder", "fifo", "device"])
@pytest.mark.parametrize("name", [BASE_WEIGHTS, "config.json"])
def test_folders_and_devices_in_place_of_files_are_refused(broken_model, name, kind):
    path = broken_model / name
    path.unlink()
    make = {
        "loop": lambda: path.symlink_to(path.name),
        "dangling": lambda: path.symlink_to("/nonexistent"),
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }
    make[kind]()
    refused(lambda: load(broken_model), name)


# ── chat templates ────────────────────────────────────────────────────────────────────────


BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ messages * 10**9 }}",
    "{{ 10 ** (10**10) }}",
    "{{ (10**60) ** 60 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% for i in [1] %}" * 40 + "{% endfor %}" * 40,
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ undefined.attribute }}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", BOMBS, ids=lambda template: template[:30])
def test_a_template_that_explodes_is_refused(broken_model, template):
    """Loading renders nothing. Loops in loops are not bounded: nor are they in transformers."""
    (broken_model / "chat_template.jinja").write_text(template)
    tokenizer = load(broken_model)[1]
    assert tokenizer is not None
    with bounded(), pytest.raises(ValueError, match="chat_template"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_sums_and_products_of_everyday_templates_work(broken_model):
    (broken_model / "chat_template.jinja").write_text("{{ '-' * 20 }}{{ 2 * 3 ** 2 }}")
    tokenizer = load(broken_model)[1]
    assert tokenizer is not None
    assert tokenizer.render_chat([{"role": "user"}]) == "-" * 20 + "18"
