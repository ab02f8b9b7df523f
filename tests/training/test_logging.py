"""log= by name: what is written, on resume too, and which errors name an extra."""

import json
import sys
from types import SimpleNamespace

import pytest

from fastlora.training.logging import extras
from fastlora.training.loop import train
from oracles.training_runs import QUIET, ROWS, Killed, Recorder, long_run, stop_at


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_jsonl_holds_every_record_once_after_a_kill(dropping, tokenizer, tmp_path):
    records: list[dict] = []
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path, log=["jsonl", stop_at(3)])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    long_run(dropping, tokenizer, tmp_path, resume=True, log=("jsonl", records.append))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert lines(tmp_path)[2:] == records
    history = json.loads((tmp_path / "training_run.json").read_text())["history"]
    assert lines(tmp_path) == history


def test_each_function_of_a_list_gets_its_copy(model, tokenizer):
    seen: list[dict] = []
    train(model, tokenizer, ROWS, max_steps=2, log=[dict.clear, seen.append], **QUIET)
    assert [record["step"] for record in seen] == [1, 2]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_the_settings_and_every_step(model, tokenizer, tmp_path, monkeypatch, name):
    module = Recorder(name)
    monkeypatch.setitem(sys.modules, name, module)
    train(model, tokenizer, ROWS, max_steps=2, output_dir=tmp_path / "first", log=name, **QUIET)
    (init, _, given), *logged, (finish, _, _) = module.calls
    assert (init, finish) == ("init", "finish")
    assert given["name"] == "first" and given["config"]["max_steps"] == 2
    assert ("project" in given) == (name == "trackio")
    assert [more["step"] for _, _, more in logged] == [1, 2]
    figures = logged[0][1][0]
    assert {"loss", "grad_norm/A", "update_norm/B"} <= figures.keys() and "step" not in figures


def test_a_run_that_the_user_started_stays_open(model, tokenizer, monkeypatch):
    module = Recorder("wandb")
    module.run = object()
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(model, tokenizer, ROWS, max_steps=1, log="wandb", **QUIET)
    assert [call for call, _, _ in module.calls] == ["log"]


def test_a_service_is_finished_after_an_error(model, tokenizer, monkeypatch):
    module = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(Killed):
        train(model, tokenizer, ROWS, max_steps=3, log=["wandb", stop_at(1)], **QUIET)
    assert module.calls[-1][0] == "finish"


def test_tensorboard_hides_the_steps_that_a_killed_run_lost(
    dropping, tokenizer, tmp_path, monkeypatch
):
    calls: list[tuple] = []

    def writer(folder: str, **given) -> SimpleNamespace:
        calls.append(("open", folder, given))
        return SimpleNamespace(
            add_text=lambda *args: None,
            add_scalar=lambda *args: calls.append(args),
            close=lambda: calls.append(("close",)),
        )

    module = SimpleNamespace(SummaryWriter=writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path, log=["tensorboard", stop_at(3)])
    assert calls[0] == ("open", str(tmp_path / "tensorboard"), {"purge_step": 1})
    assert calls[-1] == ("close",)
    calls.clear()
    long_run(dropping, tokenizer, tmp_path, resume=True, log="tensorboard")
    assert calls[0][2] == {"purge_step": 3}
    assert [c[2] for c in calls if c[0] == "loss"] == [3, 4, 5, 6]
    assert {"eval_loss", "update_norm/A"} <= {c[0] for c in calls}


def test_tensorboard_reads_what_was_written(model, tokenizer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    _, history = train(
        model, tokenizer, ROWS, max_steps=3, output_dir=out, log="tensorboard", **QUIET
    )
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(history.losses, rel=1e-6)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_extra_is_named_before_any_work(model, tokenizer, tmp_path, monkeypatch, name):
    def missing(module: str):
        # torch.utils.tensorboard exists, and imports the package.
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras, "import_module", missing)
    cure = rf"log=\"{name}\" needs {name}; in the clone of fastlora: pip install -e '.\[{name}\]'"
    with pytest.raises(ModuleNotFoundError, match=cure):
        train(model, tokenizer, ROWS, output_dir=tmp_path / "out", log=name, **QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("mlflow", "log='mlflow': expected None or a function, 'jsonl'"),
        (["jsonl", 3], "log=.*: expected None or a function"),
        ("jsonl", "log='jsonl' without output_dir"),
        (["jsonl", "jsonl"], "'jsonl' twice"),
    ],
)
def test_bad_logs_are_refused(model, tokenizer, log, message):
    call = getattr(train, "__wrapped__", train)
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer, ROWS, log=log, **QUIET)
