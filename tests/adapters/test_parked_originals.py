"""temporary_location: originals of trained copies wait in a file; tests/gpu does the GPU part.

These tests park originals on the CPU too, where `lora` keeps them in memory.
"""

import gc
import os

import pytest
import torch

import fastlora
from fastlora import functional as FL
from fastlora.adapters.parked_originals import location_problems, park_originals
from fastlora.models.self_contained import parked_originals, unpark_originals, unread
from fastlora.models.spec import Extras

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.arange(10)[None]


def away(base, folder, *replaced, tied=False):
    extras = Extras(replaced=replaced, tied=tied)
    return park_originals(base, extras, folder, always=True)


@pytest.mark.parametrize(
    ("family", "replaced", "tied", "expected"),
    [
        ("llama2", (EMBED, HEAD), False, ["embed_tokens", "lm_head"]),
        ("llama2", (HEAD,), False, ["lm_head"]),
        ("llama2", ("model.norm.weight",), False, []),
        ("llama3.2", (EMBED,), False, []),  # the head reads it
        ("llama3.2", (HEAD,), False, []),  # the embedding does
        ("llama3.2", (EMBED, HEAD), False, ["embed_tokens"]),
        ("llama3.2", (EMBED,), True, ["embed_tokens"]),
        ("llama3.2", (), True, []),  # LoRA, over the matrix itself
    ],
)
def test_originals_that_are_not_read_are_parked(family, replaced, tied, expected, pair):
    assert unread(pair(family).model.base, Extras(replaced=replaced, tied=tied)) == expected


def test_the_file_has_a_unique_name_and_is_deleted_with_the_last_model(pair, tmp_path):
    base = pair("llama2").model.base
    folder = tmp_path / "not" / "there"
    one, two = away(base, folder, EMBED, HEAD), away(base, folder, HEAD)
    assert len(os.listdir(folder)) == 3
    for key in ("embed_tokens", "lm_head"):
        assert torch.equal(one[key], base[key]) and one[key].data_ptr() != base[key].data_ptr()
    assert two["embed_tokens"] is base["embed_tokens"]
    shared = dict(one)
    del one
    gc.collect()
    assert len(os.listdir(folder)) == 3
    del shared
    gc.collect()
    assert len(os.listdir(folder)) == 1
    kept = two["lm_head"].detach()  # over the same memory, without the name
    del two
    gc.collect()
    assert not os.listdir(folder) and torch.equal(kept, base["lm_head"])


def test_a_model_with_parked_originals_trains_merges_and_is_disabled(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fastlora.adapters.create.park_originals",
        lambda base, extras, folder: park_originals(base, extras, folder, always=True),
    )
    base = pair("llama2").model
    settings = dict(r=2, modules_to_save=["embed_tokens", "lm_head"])
    model = fastlora.lora(base, **settings, temporary_location=tmp_path / "here")
    assert len(os.listdir(tmp_path / "here")) == 2
    batch = {"input_ids": IDS, "labels": IDS}
    fastlora.value_and_grad(FL.loss)(model.adapter, model.base, model.spec, batch)
    assert torch.equal(fastlora.disable(model)(IDS), base(IDS))
    torch.testing.assert_close(fastlora.merge(model)(IDS), base(IDS))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(fastlora.load_adapter(model, tmp_path / "saved")(IDS), model(IDS))
    moved = model.to("cpu")
    assert moved.base["lm_head"] is model.base["lm_head"]


def test_on_the_cpu_nothing_is_written(pair, tmp_path):
    folder = tmp_path / "none"
    model = fastlora.lora(
        pair("llama2").model, r=2, modules_to_save=["lm_head"], temporary_location=folder
    )
    assert not folder.exists() and parked_originals(model.base) == {}
    assert unpark_originals(model.base) is model.base


def test_the_location_is_checked_only_before_a_write(pair, tmp_path):
    """Plain LoRA in a read-only working directory needs none."""
    (tmp_path / "file").write_text("")
    base = pair("llama2").model.base
    elsewhere = {**base, "norm": torch.empty(32, device="meta")}  # as if it were an accelerator
    copied = Extras(replaced=(HEAD,))
    assert location_problems(elsewhere, Extras(), tmp_path / "file") == []
    assert location_problems(base, copied, tmp_path / "file") == []
    (problem,) = location_problems(elsewhere, copied, tmp_path / "file")
    assert "is a file; choose another name" in problem
    assert location_problems(elsewhere, copied, tmp_path / "new" / "folder") == []


def test_an_unwritable_location_leaves_no_file(pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        away(pair("llama2").model.base, tmp_path / "file", HEAD)
    assert os.listdir(tmp_path) == ["file"]
