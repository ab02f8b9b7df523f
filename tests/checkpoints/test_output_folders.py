"""Folders that a model cannot be written to: refused before any file, and left as they were."""

import shutil

import pytest

import fastlora
from fastlora.checkpoints.hub import DEMO
from faults import folders
from faults.case import tuned


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = folders.write_all(tmp_path_factory.mktemp("models")) / "base"
    return tuned(fastlora.load(base, device="cpu")[0])


@pytest.mark.parametrize("save", ["save_pretrained", "save_pretrained_merged"])
@pytest.mark.parametrize("path", ["x" * 300, "a/" + "é" * 200, "/proc/no-such", "/proc/1/x/y"])
def test_a_folder_that_no_file_system_makes_is_refused_by_name(model, save, path):
    with pytest.raises((ValueError, PermissionError), match=r"cannot be written|cannot name") as e:
        getattr(model, save)(path)
    assert path[:50] in str(e.value)


def test_a_refused_folder_keeps_its_files(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file"):
        model.save_pretrained(tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_but_the_adapter_is_left_in_the_parent(model, tmp_path):
    model.save_pretrained(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_the_bases_folder_is_refused_by_every_name(dense_folder, tmp_path, monkeypatch):
    """From another working directory, by a link, and where load was given a name ("demo")."""
    shutil.copytree(dense_folder(), tmp_path / "a" / "base")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "base")
    monkeypatch.chdir(tmp_path / "a")
    base, _ = fastlora.load("base", device="cpu")
    monkeypatch.chdir(tmp_path)
    for folder in ("a/base", "link"):
        with pytest.raises(ValueError, match="the folder the base was loaded from"):
            fastlora.lora(base, r=2).save_pretrained(folder)
    demo, tokenizer = fastlora.load("demo", device="cpu")
    with pytest.raises(ValueError, match="the folder the base was loaded from"):
        fastlora.lora(demo, r=2).save_pretrained_merged(DEMO, tokenizer)
    fastlora.lora(demo, r=2).save_pretrained_merged("demo", tokenizer)
    fastlora.lora(demo, r=2).save_pretrained_merged("demo", tokenizer)  # another one's folder


def test_an_adapter_is_not_written_beside_a_model(model, tmp_path):
    """`load` refuses such a folder."""
    model.save_pretrained_merged(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for save in (model.save_pretrained, lambda x: model.save_pretrained_merged(x, None, "lora")):
        with pytest.raises(ValueError, match=r"files of another model: model\.safetensors"):
            save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_another_adapter_is_replaced(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # some libraries write the base's
    model.save_pretrained(tmp_path)
