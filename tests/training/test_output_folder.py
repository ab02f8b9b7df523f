"""The folder of a run: digests, damaged checkpoints, locks, other runs' results, space."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from fastlora.checkpoints import atomic
from fastlora.errors import CheckpointError
from fastlora.formats.peft.writing import WEIGHTS_FILE
from fastlora.training import checkpoint, lock
from fastlora.training.checkpoint import STATE_FILE
from fastlora.training.lock import LOCK_FILE, output_lock
from fastlora.training.loop import train
from fastlora.training.output_folder import RUN_FILE
from oracles.training_runs import QUIET, ROWS, long_run
from oracles.trees import same_bits

STATE = "trainer_state.json"


@pytest.fixture
def copied(cut, tmp_path) -> Path:
    """A copy of the run that stopped after checkpoint-4."""
    return Path(shutil.copytree(cut, tmp_path / "run"))


@pytest.fixture(scope="module")
def finished(dropping, tokenizer, tmp_path_factory) -> Path:
    """The same run, to its end."""
    folder = tmp_path_factory.mktemp("finished")
    long_run(dropping, tokenizer, folder)
    return folder


# ── digests ──


def test_the_state_has_a_digest_of_every_other_file(cut):
    folder = cut / "checkpoint-4"
    names = {p.name for p in folder.iterdir()} - {STATE}
    assert set(json.loads((folder / STATE).read_text())["files"]) == names
    assert len(names) == 4


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", STATE]
)
def test_a_flipped_bit_is_refused_before_the_first_step(dropping, tokenizer, copied, name):
    path = copied / "checkpoint-4" / name
    data = bytearray(path.read_bytes())
    # In the JSON of the state, a digit of a loss.
    place = data.index(b'"loss"') + 14 if name == STATE else len(data) - 3
    data[place] ^= 1
    path.write_bytes(data)
    records: list[dict] = []
    with pytest.raises(CheckpointError, match=name) as error:
        long_run(dropping, tokenizer, copied, resume=True, log=records.append)
    assert not records
    assert f"resume={str(copied / 'checkpoint-2')!r}" in str(error.value)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", STATE])
@pytest.mark.parametrize("other", ["another step", "another seed"])
def test_a_file_of_another_checkpoint_is_refused(
    dropping, tokenizer, copied, finished, tmp_path, name, other
):
    source = finished / "checkpoint-6"
    if other == "another seed":
        long_run(dropping, tokenizer, tmp_path / "other", seed=5, max_steps=4)
        source = tmp_path / "other" / "checkpoint-4"
    shutil.copyfile(source / name, copied / "checkpoint-4" / name)
    with pytest.raises(ValueError, match=r"another run|checkpoint-4 is damaged"):
        long_run(dropping, tokenizer, copied, resume=True)


HISTORIES = {
    "a step twice": lambda h: [*h[:-1], h[-2]],
    "a step left out": lambda h: h[1:],
    "turned round": lambda h: h[::-1],
    "one more": lambda h: [*h, h[-1]],
    "a huge step": lambda h: [*h[:-1], h[-1] | {"step": 10**400}],
    "a huge number of tokens": lambda h: [*h[:-1], h[-1] | {"tokens": 10**400}],
    "no history": lambda h: [],
}


@pytest.mark.parametrize("change", HISTORIES)
def test_a_history_of_other_steps_is_refused(dropping, tokenizer, copied, change):
    """Also if its digest is right."""
    path = copied / "checkpoint-4" / STATE
    state = json.loads(path.read_text())
    del state["sha256"]
    state["history"] = HISTORIES[change](state["history"])
    path.write_text(json.dumps(state | {"sha256": checkpoint._json_digest(state)}))
    with pytest.raises(CheckpointError, match=STATE):
        long_run(dropping, tokenizer, copied, resume=True)


# ── going on ──


def test_a_damaged_checkpoint_is_replaced_by_the_run_from_the_one_before(
    dropping, tokenizer, copied, finished
):
    damaged = copied / "checkpoint-4" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        long_run(dropping, tokenizer, copied, resume="auto")
    long_run(dropping, tokenizer, copied, resume=copied / "checkpoint-2")
    assert [*checkpoint.complete_checkpoints(copied)] == [2, 4, 6]
    for name in ("checkpoint-4/optimizer.safetensors", "adapter_model.safetensors"):
        assert (copied / name).read_bytes() == (finished / name).read_bytes()


def test_the_only_checkpoint_is_damaged(dropping, tokenizer, copied):
    shutil.rmtree(copied / "checkpoint-4")
    (copied / "checkpoint-2" / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"README.md is not there(.|\n)*new run"):
        long_run(dropping, tokenizer, copied, resume=True)


def test_resume_auto_starts_and_continues(dropping, tokenizer, copied, finished, tmp_path):
    started, _ = long_run(dropping, tokenizer, tmp_path / "new", resume="auto")
    records: list[dict] = []
    continued, _ = long_run(dropping, tokenizer, copied, resume="auto", log=records.append)
    assert [r["step"] for r in records] == [5, 6]
    assert same_bits(started.adapter, continued.adapter)
    with pytest.raises(FileNotFoundError, match='resume="auto"'):
        long_run(dropping, tokenizer, tmp_path / "none", resume=True)
    with pytest.raises(ValueError, match="resume='auto' without output_dir"):
        train(dropping, tokenizer, ROWS, resume="auto")


# ── one run at a time, and no other run's results ──


def test_a_second_run_is_refused_while_the_first_goes_on(model, tokenizer, tmp_path):
    refused = []

    def log(_):
        with pytest.raises(ValueError, match="in use") as error:
            train(model, tokenizer, ROWS, output_dir=tmp_path, max_steps=1, **QUIET)
        refused.append(str(error.value))

    train(model, tokenizer, ROWS, output_dir=tmp_path, max_steps=1, log=log, **QUIET)
    assert f"process {os.getpid()} trains into it" in refused[0]
    assert not (tmp_path / LOCK_FILE).exists()


def test_another_process_holds_the_lock_until_it_dies(tmp_path):
    script = (
        "import sys; from pathlib import Path; from fastlora.training.lock import output_lock\n"
        "with output_lock(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match=f"process {other.pid} trains"), output_lock(tmp_path):
            pass
        other.kill()
    assert (tmp_path / LOCK_FILE).exists(), "it was killed"
    with output_lock(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().strip() == str(os.getpid())
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_refused_run_leaves_no_folder(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        train(model, tokenizer, ROWS, eval_data=[], output_dir=tmp_path / "a" / "b", **QUIET)
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_locked_is_not_left(tmp_path, monkeypatch):
    """The folder can be created, and the file of the lock cannot."""

    def fails(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock, "_locked_file", fails)
    with pytest.raises(ValueError, match="No space left"), output_lock(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()


def test_a_finished_adapter_is_replaced_by_the_same_run_only(model, tokenizer, tmp_path):
    given = dict(output_dir=tmp_path, max_steps=2, **QUIET)
    train(model, tokenizer, ROWS, **given)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"finished adapter of another run(.|\n)*seed: 3407"):
        train(model, tokenizer, ROWS, **given, seed=1)
    train(model, tokenizer, ROWS, **given)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    (tmp_path / RUN_FILE).unlink()
    with pytest.raises(ValueError, match="an adapter that this run did not make"):
        train(model, tokenizer, ROWS, **given)


def test_a_run_from_another_adapter_does_not_replace_the_first_ones(model, tokenizer, tmp_path):
    """The second stage of two, whose output_dir was not changed."""
    given = dict(output_dir=tmp_path, max_steps=1, **QUIET)
    first, _ = train(model, tokenizer, ROWS, **given)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    with pytest.raises(ValueError, match=r"adapter before the first step: '.*' there, '.*' now"):
        train(first, tokenizer, ROWS, **given)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before


def test_checkpoints_of_another_trainer_are_not_touched(model, tokenizer, tmp_path):
    """transformers' Trainer has a trainer_state.json too, and Unsloth's notebooks "outputs"."""
    for step in (1, 2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / STATE_FILE).write_text(f'{{"global_step": {step}, "log_history": []}}')
        (folder / WEIGHTS_FILE).write_bytes(b"of TRL")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for more in (dict(keep=1), dict(resume="auto"), dict(resume=True)):
        given = dict(output_dir=tmp_path, save_every=1, max_steps=3, **more, **QUIET)
        with pytest.raises(ValueError, match=r"did not write.*checkpoint-1, .*checkpoint-10"):
            train(model, tokenizer, ROWS, **given)
    with pytest.raises(ValueError, match=r"another program than fastlora\.train wrote this"):
        train(model, tokenizer, ROWS, resume=tmp_path / "checkpoint-2", max_steps=3, **QUIET)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ── space ──


def test_too_little_space_is_found_before_the_first_step(model, tokenizer, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage(10**9, 0, 10**5))
    records: list[dict] = []
    out = tmp_path / "out"
    given = dict(output_dir=out, max_steps=4, save_every=1, log=records.append, **QUIET)
    with pytest.raises(OSError, match="bytes free") as error:
        train(model, tokenizer, ROWS, **given)
    assert error.value.errno == errno.ENOSPC
    assert str(out) in str(error.value) and "100,000" in str(error.value)
    assert not records and not out.exists()
