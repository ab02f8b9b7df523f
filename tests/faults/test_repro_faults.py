"""Section C of issue 16: a minimal reproduction for each kind of fault that needs no worker.

The kinds 7 to 10, which end or stop the process, are in test_files.py; 11, 13 and 14 are in
test_calls.py with all their cases.
"""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from safetensors.torch import load_file, save_file

import fastlora
from faults import folders
from faults.case import IDS, tuned

STATE = "trainer_state.json"
RUN = dict(max_steps=4, save_every=1, batch_size=2, packing=False, progress=False)


def load(folder, **settings):
    return fastlora.load(folder, device="cpu", local_files_only=True, **settings)


@pytest.fixture
def base(tmp_path) -> Path:
    """A model's folder with its tokenizer."""
    return folders.write_all(tmp_path) / "base"


@pytest.fixture
def run(base, tmp_path) -> Path:
    """A finished run of four steps."""
    train(base, tmp_path / "run")
    return tmp_path / "run"


def train(base, out, model=None, **settings):
    loaded, tokenizer = load(base)
    model = tuned(loaded) if model is None else model
    given = RUN | dict(output_dir=out) | settings
    return fastlora.train(model, tokenizer, folders.rows(8), **given)


def back_to(run, step: int) -> None:
    """As if the run had been ended after a step."""
    for folder in run.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    (run / "adapter_model.safetensors").unlink(missing_ok=True)


def test_c1_another_steps_optimizer_is_refused_by_name(base, run):
    name = "optimizer.safetensors"
    shutil.copyfile(run / "checkpoint-4" / name, run / "checkpoint-2" / name)
    back_to(run, 2)
    with pytest.raises(fastlora.CheckpointError, match=name):
        train(base, run, resume=True)


def test_c1_a_flipped_bit_of_the_adapter_is_refused_by_name(base, run):
    path = run / "checkpoint-2" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    back_to(run, 2)
    with pytest.raises(fastlora.CheckpointError, match=path.name):
        train(base, run, resume=True)


def test_c1_a_history_of_wrong_steps_is_refused(base, run):
    path = run / "checkpoint-2" / STATE
    raw = json.loads(path.read_text())
    raw["history"][1]["step"] = 7
    path.write_text(json.dumps(raw))
    back_to(run, 2)
    with pytest.raises(fastlora.CheckpointError, match=STATE):
        train(base, run, resume=True)


def changed_config(base, **fields):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def changed_weight(base):
    path = base / "model.safetensors"
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    tensors["model.layers.1.mlp.down_proj.weight"][10, 10] += 1  # beyond the first 64 elements
    save_file(tensors, path, {"format": "pt"})


OTHER_RUNS = {
    "rope_theta": (lambda base: changed_config(base, rope_theta=500.0), {}),
    "rms_norm_eps": (lambda base: changed_config(base, rms_norm_eps=1e-3), {}),
    "base model": (changed_weight, {}),
    "qat_scheme": (lambda base: None, dict(qat_scheme="int8")),
    "lora_dropout": (lambda base: None, dict(lora_dropout=0.1)),
    "alpha|scaling": (lambda base: None, dict(lora_alpha=8)),
}


@pytest.mark.parametrize("what", OTHER_RUNS)
def test_c2_a_run_of_another_model_is_refused_by_what_differs(base, run, what):
    change, settings = OTHER_RUNS[what]
    back_to(run, 2)
    change(base)
    with pytest.raises(ValueError, match="another run") as error:
        train(base, run, model=tuned(load(base)[0], **settings), resume=True)
    assert re.search(what, str(error.value))


def test_c3_two_runs_do_not_share_a_folder(base, tmp_path):
    """The second starts while the first is in its first step."""
    refused = []

    def log(record):
        if not refused:
            with pytest.raises((ValueError, OSError)) as error:
                train(base, tmp_path / "run", seed=1)
            refused.append(str(error.value))

    train(base, tmp_path / "run", save_every=None, log=log)
    assert str(os.getpid()) in refused[0]


def test_c3_a_finished_adapter_of_another_run_is_not_replaced(base, tmp_path):
    out = tmp_path / "run"
    train(base, out, save_every=None)
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=out.name):
        train(base, out, save_every=None, seed=1)
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_c4_resume_auto_starts_and_goes_on(base, run, tmp_path):
    train(base, tmp_path / "auto", resume="auto")
    back_to(run, 2)
    train(base, run, resume="auto")
    name = "adapter_model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "auto" / name).read_bytes()


def test_c4_a_damaged_newest_checkpoint_names_the_one_before(base, run):
    back_to(run, 3)
    (run / "checkpoint-3" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(fastlora.CheckpointError, match="checkpoint-2"):
        train(base, run, resume=True)
    train(base, run, resume=run / "checkpoint-2")
    assert (run / "checkpoint-4" / STATE).is_file()


def test_c4_a_full_disk_names_the_path_and_the_newest_checkpoint(base, tmp_path):
    written = []
    plain = os.fsync

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "checkpoint-3" in path and ".tmp" in path:
            written.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(descriptor)

    with mock.patch("os.fsync", fsync), pytest.raises(OSError) as error:
        train(base, tmp_path / "run")
    notes = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert written
    assert "checkpoint-3" in notes
    assert "checkpoint-2" in notes


def test_c5_an_exception_in_log_leaves_the_trained_state(base, tmp_path):
    def log(record):
        if record["step"] == 3:
            raise KeyError("mine")

    with pytest.raises(KeyError):
        train(base, tmp_path / "run", save_every=100, log=log)
    assert (tmp_path / "run" / "checkpoint-3" / STATE).is_file()


@pytest.fixture
def with_nan(base):
    """The model with a NaN in the query projection of its second layer."""
    path = base / "model.safetensors"
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    return load(base)[0]


def test_c6_training_over_nan_names_the_layer(base, tmp_path, with_nan):
    with pytest.raises(FloatingPointError, match=r"layers\.1"):
        train(base, tmp_path / "run", model=tuned(with_nan))


@pytest.mark.parametrize("settings", [{}, dict(temperature=1.0, seed=0)])
def test_c6_generation_over_nan_is_refused(with_nan, settings):
    with pytest.raises(FloatingPointError, match="NaN"):
        with_nan.generate(IDS[:, :3], max_new_tokens=2, **settings)


def test_c6_pissa_over_nan_names_the_matrix(with_nan):
    with pytest.raises((ValueError, FloatingPointError), match=r"layers\.1"):
        fastlora.lora(with_nan, r=2, init_lora_weights="pissa")


def test_c6_quantize_over_nan_names_the_matrix(with_nan):
    with pytest.raises((ValueError, FloatingPointError), match=r"layers\.1"):
        fastlora.quantize(with_nan)


@pytest.mark.parametrize("settings", [dict(learning_rate=1e39), dict(weight_decay=1e308)])
def test_c6_numbers_beyond_float32_are_refused_before_the_first_step(base, tmp_path, settings):
    steps = []
    with pytest.raises(ValueError, match=next(iter(settings))):
        train(base, tmp_path / "run", log=steps.append, **settings)
    assert not steps


def test_c12_row_files_are_read_as_strictly_as_model_files(base, tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text('{"text": "w1 w2"}\n{"text": "w1", "text": "w2"}\n')
    model, tokenizer = load(base)
    with pytest.raises(fastlora.CheckpointError, match=r"twice\.jsonl(.|\n)*line 2"):
        fastlora.train(tuned(model), tokenizer, path, max_steps=1, packing=False, progress=False)


def test_c15_saving_a_tokenizer_deletes_nothing_through_a_link(base, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (outside / "mine.jinja").write_text("keep me")
    (folder / "additional_chat_templates").symlink_to(outside)
    try:
        load(base)[1].save_pretrained(folder)
    except ValueError as error:
        assert "additional_chat_templates" in str(error)
    assert (outside / "mine.jinja").read_text() == "keep me"


def test_c15_control_characters_of_a_file_do_not_reach_the_terminal(base, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\x1b[2J\x07\n")
    model, tokenizer = load(base)
    with pytest.raises(fastlora.CheckpointError) as error:
        fastlora.train(tuned(model), tokenizer, path, max_steps=1, packing=False, progress=False)
    assert str(error.value).replace("\n", "").isprintable()


def pushed(base, **hub) -> tuple[BaseException | None, Path]:
    """What push_to_hub raises, and a copy of the folder that it uploads."""
    copied = base.parent / "pushed"

    def upload_folder(self, *, folder_path, **_):
        shutil.copytree(folder_path, copied, dirs_exist_ok=True)

    create = mock.Mock(return_value="https://huggingface.co/a/b", **hub)
    with (
        mock.patch("huggingface_hub.HfApi.create_repo", create),
        mock.patch("huggingface_hub.HfApi.upload_folder", upload_folder),
    ):
        try:
            tuned(load(base)[0]).push_to_hub("a/b", token="hf_x")
        except Exception as error:  # noqa: BLE001  the tests check its class
            return error, copied
    return None, copied


def test_c15_push_to_hub_uploads_no_path_of_this_machine(base):
    error, folder = pushed(base)
    assert error is None
    for path in folder.rglob("*"):
        assert not path.is_file() or str(base.parent).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize("status", [401, 403])
def test_c16_a_push_without_the_right_is_refused_in_our_words(base, status):
    response = mock.Mock(status_code=status, headers={})
    error, _ = pushed(base, side_effect=HfHubHTTPError("Forbidden", response=response))
    assert isinstance(error, PermissionError)
    assert "a/b" in str(error)
    assert "token" in str(error)


def test_c16_a_lost_connection_while_pushing_is_a_connection_error(base):
    error, _ = pushed(base, side_effect=HTTPError("no route"))
    assert isinstance(error, ConnectionError)
    assert "a/b" in str(error)


def test_the_shared_ids_are_in_the_vocabulary():
    """The suite's own batch must be good, or every refusal above would mean nothing."""
    assert int(IDS.max()) < folders.VOCAB_SIZE
    assert IDS.dtype == torch.int64
