"""Folders of weights: shards, prefixes, stale keys, the tied head."""

from pathlib import Path

import pytest
import torch

from fastlora.checkpoints.tensors import (
    INDEX,
    WEIGHTS,
    Entry,
    read_entries,
    write_json,
    write_safetensors,
)
from fastlora.checkpoints.weight_files import check_entries, resolve_tied_head, scan
from fastlora.errors import CheckpointError
from fastlora.models.names import EMBED_TOKENS, LM_HEAD

# ── a folder ──────────────────────────────────────────────────────────────────────────────


def shards(folder: Path, files: dict[str, list[str]], weight_map: dict[str, str]) -> Path:
    for file, keys in files.items():
        write_safetensors(folder / file, {key: torch.ones(2) for key in keys})
    write_json(folder / INDEX, {"weight_map": weight_map})
    return folder


def test_shards_are_one_checkpoint(tmp_path):
    files = {"1.safetensors": ["model.a", "model.b"], "2.safetensors": [LM_HEAD]}
    where = {"model.a": "1.safetensors", "model.b": "1.safetensors", LM_HEAD: "2.safetensors"}
    entries = scan(shards(tmp_path, files, where))
    assert {name: e.path.name for name, e in entries.items()} == where


def test_missing_shards_are_named(tmp_path):
    where = {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}
    shards(tmp_path, {"1.safetensors": ["a"]}, where)
    with pytest.raises(FileNotFoundError, match=r"2\.safetensors, 3\.safetensors"):
        scan(tmp_path)


def test_shards_and_index_must_agree(tmp_path):
    files = {"1.safetensors": ["a", "twice"], "2.safetensors": ["b", "twice", "unlisted"]}
    where = {"a": "2.safetensors", "b": "2.safetensors", "twice": "1.safetensors"}
    with pytest.raises(CheckpointError) as refused:
        scan(shards(tmp_path, files, where))
    text = str(refused.value)
    assert "a: not in 2.safetensors" in text
    assert "a: in 1.safetensors" in text
    assert "twice: stored twice, in 1.safetensors and 2.safetensors" in text.replace("model.", "")
    assert "unlisted: in 2.safetensors" in text


def test_all_broken_shards_are_listed(tmp_path):
    files = {"1.safetensors": ["a"], "2.safetensors": ["b"]}
    shards(tmp_path, files, {"a": "1.safetensors", "b": "2.safetensors"})
    for file in files:
        (tmp_path / file).write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=r"1\.safetensors(.|\n)*2\.safetensors"):
        scan(tmp_path)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*pickles"):
        scan(tmp_path)


def test_names_get_their_prefix_and_stale_keys_are_dropped(tmp_path):
    stored = ["embed_tokens.weight", "layers.0.self_attn.rotary_emb.inv_freq", LM_HEAD, "model.x"]
    write_safetensors(tmp_path / WEIGHTS, {key: torch.ones(1) for key in stored})
    assert scan(tmp_path).keys() == {EMBED_TOKENS, LM_HEAD, "model.x"}


def test_a_tensor_stored_with_and_without_prefix_is_refused(tmp_path):
    write_safetensors(tmp_path / WEIGHTS, {"model.a": torch.ones(1), "a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"model\.a: stored twice"):
        scan(tmp_path)


def test_every_difference_is_listed_at_once(tmp_path):
    stored = {
        "model.misshapen": torch.ones(2, 3),
        "model.whole_numbers": torch.ones(2, dtype=torch.int32),
        "model.extra": torch.ones(1),
    }
    write_safetensors(tmp_path / WEIGHTS, stored)
    expected = {"model.misshapen": (3, 2), "model.whole_numbers": (2,), "model.absent": (5,)}
    with pytest.raises(CheckpointError) as refused:
        check_entries(tmp_path, scan(tmp_path), expected)
    lines = str(refused.value).split("\n")
    assert "  missing     model.absent (5,)" in lines
    assert f"  unexpected  model.extra in {WEIGHTS} (1,)" in lines
    assert any("model.misshapen" in x and "(2, 3)" in x and "(3, 2)" in x for x in lines)
    assert any("model.whole_numbers" in x and "I32" in x and "BF16" in x for x in lines)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "U8", "BOOL", "I64"])
def test_weights_are_floats(dtype):
    found = {"w": Entry(Path("f"), "w", dtype, (2,))}
    with pytest.raises(CheckpointError, match=f"w in f: file has {dtype}"):
        check_entries(Path("folder"), found, {"w": (2,)})


# ── a tied head ───────────────────────────────────────────────────────────────────────────


def with_head(folder: Path, **stored: torch.Tensor) -> dict[str, Entry]:
    names = {"embedding": EMBED_TOKENS, "head": LM_HEAD}
    write_safetensors(folder / WEIGHTS, {names[k]: t for k, t in stored.items()})
    return scan(folder)


def test_an_equal_head_is_tied(tmp_path):
    entries, tied = resolve_tied_head(
        with_head(tmp_path, embedding=torch.ones(2, 3), head=torch.ones(2, 3)), True
    )
    assert tied and entries.keys() == {EMBED_TOKENS}


@pytest.mark.parametrize(
    "head", [torch.zeros(2, 3), torch.ones(3, 3), torch.ones(2, 3, dtype=torch.bfloat16)]
)
def test_a_different_head_is_not_tied(tmp_path, head):
    entries, tied = resolve_tied_head(
        with_head(tmp_path, embedding=torch.ones(2, 3), head=head), True
    )
    assert not tied and entries.keys() == {EMBED_TOKENS, LM_HEAD}


def test_a_head_without_an_embedding_is_used_for_both(tmp_path):
    entries, tied = resolve_tied_head(with_head(tmp_path, head=torch.ones(2, 3)), True)
    assert tied and entries[EMBED_TOKENS].key == LM_HEAD
    assert torch.equal(read_entries(entries)[EMBED_TOKENS], torch.ones(2, 3))


def test_an_untied_model_keeps_its_entries(tmp_path):
    found = with_head(tmp_path, embedding=torch.ones(2, 3))
    assert resolve_tied_head(found, False) == (found, False)
