"""Runs that end by a signal or an error: where the trained state is."""

import errno
import os
import signal
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

import fastlora
from fastlora.training import loop, step
from fastlora.training.checkpoint import complete_checkpoints
from fastlora.training.loop import train
from oracles.training_runs import QUIET, ROWS, long_run, timeless
from oracles.trees import same_bits


@pytest.fixture(scope="module")
def uninterrupted(dropping, tokenizer, tmp_path_factory):
    return long_run(dropping, tokenizer, tmp_path_factory.mktemp("whole"))


def signal_at(at: int, *numbers: int):
    def log(record: dict) -> None:
        if record["step"] == at:
            for number in numbers:
                os.kill(os.getpid(), number)

    return log


NO_SAVES = dict(save_every=100)


@pytest.fixture(autouse=True)
def sigint_as_in_a_terminal():
    """A shell's background jobs ignore SIGINT, and so would tests that run in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step_and_a_save(
    dropping, tokenizer, uninterrupted, tmp_path, capfd, number, status
):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stopped:
        long_run(dropping, tokenizer, tmp_path, log=signal_at(3, number), **NO_SAVES)
    assert stopped.value.code == status
    assert isinstance(stopped.value, KeyboardInterrupt) == (number == signal.SIGINT)
    assert [*complete_checkpoints(tmp_path)] == [3]
    assert f"saved to {tmp_path / 'checkpoint-3'}" in capfd.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed, history = long_run(dropping, tokenizer, tmp_path, resume=True, **NO_SAVES)
    assert same_bits(resumed.adapter, uninterrupted[0].adapter)
    assert timeless(history) == timeless(uninterrupted[1])


def test_a_signal_in_the_last_step_lets_the_run_finish(
    dropping, tokenizer, uninterrupted, tmp_path
):
    with pytest.raises(SystemExit) as stopped:
        long_run(dropping, tokenizer, tmp_path, log=signal_at(6, signal.SIGTERM))
    saved = fastlora.load_adapter(dropping, tmp_path)
    assert same_bits(saved.adapter, uninterrupted[0].adapter)
    assert same_bits(stopped.value.trained_model.adapter, uninterrupted[0].adapter)


def test_the_second_signal_ends_the_run_at_once(dropping, tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt) as stopped:
        log = signal_at(3, signal.SIGINT, signal.SIGINT)
        long_run(dropping, tokenizer, tmp_path, log=log, **NO_SAVES)
    assert not isinstance(stopped.value, SystemExit)
    assert not complete_checkpoints(tmp_path)


def test_signals_are_left_alone_in_other_threads_and_where_they_are_ignored(model, tokenizer):
    seen = []
    log = lambda _: seen.append(signal.getsignal(signal.SIGINT))
    run = lambda: train(model, tokenizer, ROWS, max_steps=1, log=log, **QUIET)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [before, signal.SIG_IGN]


def broken_log(record: dict) -> None:
    if record["step"] == 3:
        raise KeyError("mine")


def test_an_exception_in_log_leaves_a_checkpoint(dropping, tokenizer, uninterrupted, tmp_path):
    with pytest.raises(KeyError, match="mine") as error:
        long_run(dropping, tokenizer, tmp_path, log=broken_log, **NO_SAVES)
    assert f"saved to {tmp_path / 'checkpoint-3'}" in error.value.__notes__[0]
    resumed, _ = long_run(dropping, tokenizer, tmp_path, resume=True, **NO_SAVES)
    assert same_bits(resumed.adapter, uninterrupted[0].adapter)


def test_without_output_dir_the_exception_holds_the_state(dropping, tokenizer):
    given = dict(output_dir=None, save_every=None, lr_scheduler="constant", warmup_ratio=0.0)
    expected, _ = long_run(dropping, tokenizer, Path(), **given, max_steps=3)
    with pytest.raises(KeyError) as error:
        long_run(dropping, tokenizer, Path(), **given, log=broken_log)
    assert "trained_model" in error.value.__notes__[0]
    assert same_bits(error.value.trained_model.adapter, expected.adapter)
    assert error.value.history.steps == (1, 2, 3)


def test_a_nan_leaves_the_state_before_it(
    dropping, tokenizer, uninterrupted, tmp_path, monkeypatch
):
    real, records = step.get_total_norm, []
    norm = lambda gradient: real(gradient) * (torch.nan if len(records) == 3 else 1)
    monkeypatch.setattr(step, "get_total_norm", norm)
    with pytest.raises(FloatingPointError, match="step 4") as error:
        long_run(dropping, tokenizer, tmp_path, log=records.append, **NO_SAVES)
    assert "checkpoint-3" in error.value.__notes__[0]
    monkeypatch.setattr(step, "get_total_norm", real)
    resumed, _ = long_run(dropping, tokenizer, tmp_path, resume=True, **NO_SAVES)
    assert same_bits(resumed.adapter, uninterrupted[0].adapter)


def test_a_failed_last_save_leaves_the_state_elsewhere(
    dropping, tokenizer, uninterrupted, tmp_path, monkeypatch
):
    """The output folder cannot be written any more; the system's temporary folder can."""
    out, elsewhere, real = tmp_path / "out", tmp_path / "temporary", os.fsync
    elsewhere.mkdir()

    def fsync(descriptor):
        if str(out) in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    with pytest.raises(OSError, match=f"{out}.*training_run.json") as error:
        long_run(dropping, tokenizer, out, save_every=None)
    (saved,) = elsewhere.glob("fastlora-*/checkpoint-6")
    assert f"resume={str(saved)!r}" in error.value.__notes__[0]
    assert not [*out.rglob("*.safetensors")] and not [*out.rglob("*.tmp")]
    monkeypatch.setattr(os, "fsync", real)
    again, _ = long_run(dropping, tokenizer, out, resume=saved, save_every=None)
    assert same_bits(again.adapter, uninterrupted[0].adapter)


def test_a_run_that_fails_before_its_first_step_ends_leaves_nothing(
    model, tokenizer, tmp_path, monkeypatch
):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop, "optimizer_step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model, tokenizer, ROWS, output_dir=tmp_path / "out", max_steps=2, **QUIET)
    assert not (tmp_path / "out").exists()


# ── where a NaN comes from ──


def broken(model, value: float):
    return model.with_adapter(tree_map(lambda x: torch.full_like(x, value), model.adapter))


def test_a_nan_in_the_adapter_is_named(model, tokenizer):
    with pytest.raises(FloatingPointError, match=r"adapter's tensor .*layers\.0.*lora_A.weight"):
        train(broken(model, torch.nan), tokenizer, ROWS, max_steps=1, **QUIET)


@pytest.mark.parametrize("packing", [True, False])
def test_an_overflow_names_its_sequence_and_layer(model, tokenizer, packing):
    """All numbers are finite, and the products in the second layer are not."""
    adapter = tree_map(torch.clone, model.adapter)
    for leaf in adapter["layers"][1]["down_proj"]:
        leaf.fill_(1e25)
    huge, run = model.with_adapter(adapter), dict(max_steps=1, packing=packing, **QUIET)
    place = r"model\.layers\.1 overflows float32 for sequence 1 of micro-batch 1"
    with pytest.raises(FloatingPointError, match=place):
        train(huge, tokenizer, ROWS, **run)


def test_an_overflow_in_evaluation_names_its_sequence_and_layer(model, tokenizer, tmp_path):
    run = dict(learning_rate=1e30, max_steps=3, eval_data=ROWS[:3], eval_every=1, packing=False)
    place = r"after step 1 the loss of eval_data is nan: .*model\.layers\.\d.* sequence 1"
    with pytest.raises(FloatingPointError, match=place):
        train(model, tokenizer, ROWS, output_dir=tmp_path, **run, **QUIET)
    assert [*complete_checkpoints(tmp_path)] == [1]
