"""Checkpoints of a run: what they hold, and what a killed run resumes with."""

import dataclasses
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora.checkpoints import tensors
from fastlora.checkpoints.hub import DEMO
from fastlora.errors import CheckpointError
from fastlora.model import Model
from fastlora.training import checkpoint
from fastlora.training.history import History
from fastlora.training.loop import train
from oracles.pairs import adapted
from oracles.training_runs import LONG, ROWS, Killed, long_run, stop_at, timeless
from oracles.trees import same_bits


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(dropping, tokenizer) -> tuple[Model, History]:
    given = {name: value for name, value in LONG.items() if name != "save_every"}
    return train(dropping, tokenizer, ROWS, eval_data=ROWS[:3], **given)


@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize("by_path", [False, True])
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(
    dropping, uninterrupted, tokenizer, tmp_path, stop, by_path
):
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path, log=stop_at(stop))
    resume = tmp_path / f"checkpoint-{stop // 2 * 2}" if by_path else True
    # The adapter that resume is given does not matter, only its shape.
    fresh = adapted(dropping.with_adapter(None), seed=9, r=2, lora_dropout=0.2,
                    target_modules=["q_proj", "down_proj"])  # fmt: skip
    records: list[dict] = []
    trained, history = long_run(fresh, tokenizer, tmp_path, resume=resume, log=records.append)
    assert [r["step"] for r in records] == list(range(stop // 2 * 2 + 1, 7))
    assert same_bits(trained.adapter, uninterrupted[0].adapter)
    assert timeless(history) == timeless(uninterrupted[1])
    assert len(history.seconds) == 6


def test_a_packed_bfloat16_run_resumes_with_the_same_bits(folder, tokenizer, tmp_path):
    base, _ = fastlora.load(folder, dtype="bfloat16", max_seq_length=32, device="cpu")
    model = fastlora.lora(base, r=2, adapter_dtype="bfloat16")
    given = dict(packing=True, learning_rate=1e-2, weight_decay=0.0)
    whole, history = long_run(model, tokenizer, tmp_path / "whole", **given)
    with pytest.raises(Killed):
        long_run(model, tokenizer, tmp_path / "cut", log=stop_at(3), **given)
    resumed, again = long_run(model, tokenizer, tmp_path / "cut", resume=True, **given)
    assert same_bits(resumed.adapter, whole.adapter)
    assert timeless(again) == timeless(history)


def test_a_checkpoint_is_an_adapter_folder_and_the_last_one_the_result(
    dropping, tokenizer, tmp_path
):
    trained, history = long_run(dropping, tokenizer, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in (2, 4, 6)
    ]
    for saved in (tmp_path, tmp_path / "checkpoint-6"):
        assert same_bits(fastlora.load_adapter(dropping, saved).adapter, trained.adapter)
    earlier = fastlora.load_adapter(dropping, tmp_path / "checkpoint-4").adapter
    assert not same_bits(earlier, trained.adapter)
    # A run that has ended resumes to its own result.
    again, same = long_run(dropping, tokenizer, tmp_path, resume=True)
    assert same_bits(again.adapter, trained.adapter) and same == history


def test_a_kill_at_any_write_of_a_save_leaves_the_older_checkpoint(
    dropping, uninterrupted, tokenizer, tmp_path, monkeypatch
):
    """A checkpoint is five files; the process dies half-way through each in turn."""
    real = tensors.atomic_write
    for fatal in range(5):
        folder, second = tmp_path / str(fatal), itertools.count()

        def write(path, write, second=second, fatal=fatal):
            if path.parent.name == "checkpoint-4" and next(second) == fatal:
                path.with_name(f".{path.name}.dead.tmp").write_bytes(b"half")
                raise Killed
            real(path, write)

        monkeypatch.setattr(tensors, "atomic_write", write)
        with pytest.raises(Killed):
            long_run(dropping, tokenizer, folder)
        monkeypatch.setattr(tensors, "atomic_write", real)
        assert list(checkpoint.complete_checkpoints(folder)) == [2]
        trained, history = long_run(dropping, tokenizer, folder, resume=True)
        assert same_bits(trained.adapter, uninterrupted[0].adapter)
        assert timeless(history) == timeless(uninterrupted[1])


def test_a_process_that_is_killed_resumes(folder, base, tokenizer, tmp_path):
    """SIGKILL while the second checkpoint's moments are on their way to the disk."""
    script = textwrap.dedent(f"""
        import os, signal, json, fastlora
        from pathlib import Path
        replace = os.replace
        def dying(source, target):
            if target.parent.name == "checkpoint-4" and target.name == "optimizer.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
        os.replace = dying
        model, _ = fastlora.load({str(folder)!r}, max_seq_length=64, device="cpu")
        model = fastlora.lora(model, r=2)
        tokenizer = fastlora.Tokenizer.from_folder(Path({str(DEMO)!r}))
        rows = json.loads({json.dumps(ROWS)!r})
        given = {LONG | {"eval_every": None, "output_dir": str(tmp_path)}!r}
        fastlora.train(model, tokenizer, rows, **given)
    """)
    environ = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    ended = subprocess.run([sys.executable, "-c", script], env=environ, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    model, given = fastlora.lora(base, r=2), dict(eval_every=None, eval_data=None)
    resumed, _ = long_run(model, tokenizer, tmp_path, resume=True, **given)
    whole, _ = long_run(model, tokenizer, tmp_path / "whole", **given)
    assert same_bits(resumed.adapter, whole.adapter)


DEFAULTS = {name: p.default for name, p in inspect.signature(train).parameters.items()}

CHANGES = dict(
    learning_rate=2e-2,
    batch_size=3,
    gradient_accumulation_steps=1,
    lr_scheduler="linear",
    warmup_ratio=0.5,
    weight_decay=0.0,
    max_grad_norm=2.0,
    train_on="all",
    packing=True,
    seed=4,
)


def test_every_setting_that_would_change_the_run_is_listed(
    folder, dropping, tokenizer, cut, tmp_path
):
    before = files(cut)
    with pytest.raises(ValueError) as refused:
        long_run(dropping, tokenizer, cut, resume=True, **CHANGES, max_steps=7)
    for name, value in CHANGES.items():
        given = LONG.get(name, DEFAULTS[name])
        assert f"{name}: {given!r} there, {value!r} now" in str(refused.value)
    assert "steps of the whole run: 6 there, 7 now" in str(refused.value)
    assert "hash of the training data" in str(refused.value), "packed, and trained on all"

    other = adapted(dropping.with_adapter(None), r=4, lora_dropout=0.1, target_modules=["q_proj"])
    merged = fastlora.merge(dropping)
    merged = dataclasses.replace(dropping, base=merged.base)
    for model, data, *words in (
        (other, ROWS, "r: 2 there, 4 now", "lora_dropout: 0.2 there, 0.1 now",
         "layers.1.mlp.down_proj: {'r': 2, 'scaling': 8.0} there, absent now"),
        (merged, ROWS, "hash of the base model"),
        (dropping, ROWS[:-1] + ROWS[:1], "hash of the training data"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as refused:
            long_run(model, tokenizer, cut, resume=True, data=data)
        assert all(word in str(refused.value) for word in words), refused.value
        assert "learning_rate" not in str(refused.value)
    assert files(cut) == before


def test_a_run_at_a_constant_rate_can_be_extended(dropping, tokenizer, tmp_path):
    given = dict(lr_scheduler="constant", warmup_ratio=0.0, eval_data=None, eval_every=None)
    whole, _ = long_run(dropping, tokenizer, tmp_path / "a", **given)
    long_run(dropping, tokenizer, tmp_path / "b", **given, max_steps=3)
    longer, _ = long_run(dropping, tokenizer, tmp_path / "b", **given, resume=True)
    assert same_bits(longer.adapter, whole.adapter)
    with pytest.raises(ValueError, match=r"checkpoint-6 is of step 6, but .* at step 5"):
        long_run(dropping, tokenizer, tmp_path / "b", **given, max_steps=5, resume=True)


def test_checkpoints_are_never_overwritten(dropping, tokenizer, cut, tmp_path):
    before = files(cut)
    with pytest.raises(
        ValueError, match="checkpoint-2, checkpoint-4, and this run starts at step 1"
    ):
        long_run(dropping, tokenizer, cut)
    with pytest.raises(ValueError, match=r"holds checkpoint-4, and this run continues from .*-2:"):
        long_run(dropping, tokenizer, cut, resume=cut / "checkpoint-2")
    assert files(cut) == before
    long_run(dropping, tokenizer, tmp_path / "other", resume=cut / "checkpoint-2")
    assert list(checkpoint.complete_checkpoints(tmp_path / "other")) == [4, 6]


def test_resume_needs_a_complete_checkpoint(dropping, tokenizer, cut, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        long_run(dropping, tokenizer, tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match=r"\['checkpoint-2', 'checkpoint-4'\]"):
        long_run(dropping, tokenizer, tmp_path, resume=cut)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.safetensors"])
@pytest.mark.parametrize("content", ["half", "another"])
def test_a_broken_checkpoint_is_refused(dropping, tokenizer, cut, tmp_path, name, content):
    saved = tmp_path / "checkpoint-4"
    saved.mkdir()
    for path in (cut / "checkpoint-4").iterdir():
        (saved / path.name).write_bytes(path.read_bytes())
    whole = (saved / name).read_bytes()
    if content == "half":
        (saved / name).write_bytes(whole[: len(whole) // 2])
    elif name.endswith("json"):
        (saved / name).write_text('{"settings": 3}')
    else:
        tensors.write_safetensors(saved / name, {"model.x": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=name):
        long_run(dropping, tokenizer, tmp_path / "out", resume=saved)
    assert not (tmp_path / "out").exists()
