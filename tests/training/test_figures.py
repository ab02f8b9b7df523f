"""Pictures of histories: History.plot and scripts/plot_runs.py."""

import dataclasses
import sys

import plot_runs
import pytest

from fastlora.training.history import History
from fastlora.training.logging import extras
from fastlora.training.logging.figures import draw, smoothed
from fastlora.training.loop import train
from oracles.training_runs import QUIET, ROWS, Killed, long_run, stop_at


@pytest.fixture(scope="module")
def history(model, tokenizer) -> History:
    run = dict(max_steps=3, eval_data=ROWS[:2], eval_every=2)
    return train(model, tokenizer, ROWS, **run, **QUIET)[1]


@pytest.mark.parametrize(
    ("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_a_picture_has_the_format_of_its_ending(history, tmp_path, ending, start):
    path = tmp_path / f"run.{ending}"
    path.write_text("an older file")
    history.plot(path)
    assert path.read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file is left"


def test_the_picture_shows_every_curve(history, tmp_path):
    history.plot(tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text()
    assert text.count('id="axes_') == 4


def test_pyplot_is_not_touched(history, tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    history.plot(str(tmp_path / "run.png"))
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_bad_paths_and_empty_histories_are_refused(history, tmp_path, monkeypatch):
    past_hook = getattr(draw, "__wrapped__", draw)
    with pytest.raises(ValueError, match=r"path='run.docx': expected an ending of .*png"):
        history.plot("run.docx")
    with pytest.raises(ValueError, match="path=3"):
        past_hook(3, {"run": dataclasses.asdict(history)})
    with pytest.raises(ValueError, match="history is empty"):
        History.of([]).plot(tmp_path / "run.png")

    def missing(module: str):
        raise ModuleNotFoundError(module)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[plots\]'"):
        history.plot(tmp_path / "run.png")
    assert not [*tmp_path.iterdir()]


def test_smoothing_keeps_constants_and_short_histories():
    assert smoothed([2.0] * 500) == pytest.approx([2.0] * 500)
    assert smoothed([1.0, 5.0, 3.0]) == [1.0, 5.0, 3.0]
    noisy = [float(i % 2) for i in range(1000)]
    assert all(0.4 < x < 0.6 for x in smoothed(noisy)[100:])


def test_the_script_reads_ended_logged_and_saved_runs(
    dropping, tokenizer, tmp_path, monkeypatch, capsys
):
    _, ended = long_run(dropping, tokenizer, tmp_path / "ended")
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path / "saved", log=stop_at(5))
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path / "logged", log=["jsonl", stop_at(5)])
    with (tmp_path / "logged/log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a line that is being written
    found = {name: plot_runs.history_of(tmp_path / name) for name in ("ended", "saved", "logged")}
    assert found["ended"] == ended
    assert [len(h.steps) for h in found.values()] == [6, 4, 5]
    assert found["saved"].losses == ended.losses[:4]
    paths = [str(tmp_path / name) for name in found]
    monkeypatch.setattr(
        sys, "argv", ["plot_runs.py", *paths, "--output", str(tmp_path / "all.svg")]
    )
    plot_runs.main()
    text = (tmp_path / "all.svg").read_text()
    assert "ended, saved, logged" in capsys.readouterr().out
    assert text.count('id="axes_') == 4
    with pytest.raises(SystemExit, match="expected an output_dir"):
        plot_runs.history_of(tmp_path)


def test_a_step_of_no_time_does_not_break_the_picture(history, tmp_path):
    dataclasses.replace(history, seconds=(0.0, 0.0, 0.0)).plot(tmp_path / "run.png")
