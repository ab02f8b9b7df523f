"""sample_prompts: texts in the records of evaluations, which change no step."""

import json
import sys

import pytest

from fastlora.training.loop import train
from oracles.training_runs import QUIET, ROWS, Killed, Recorder, long_run, stop_at, timeless

PROMPTS = ["def walk(top):", [{"role": "user", "content": "def f(x):"}]]


def test_samples_are_the_models_greedy_texts(model, tokenizer):
    records: list[dict] = []
    given = dict(max_steps=3, batch_size=2, eval_every=2, log=records.append, **QUIET)
    trained, history = train(
        model, tokenizer, ROWS, sample_prompts=PROMPTS, sample_tokens=5, **given
    )
    assert ["samples" in record for record in records] == [False, True, True]
    expected = [trained.generate_text(tokenizer, p, max_new_tokens=5) for p in PROMPTS]
    assert records[2]["samples"] == [
        {"prompt": p, "text": text} for p, text in zip(PROMPTS, expected, strict=True)
    ]
    assert history.eval_steps == ()
    _, plain = train(model, tokenizer, ROWS, **given | dict(eval_every=None, log=None))
    assert timeless(plain) == timeless(history)


def test_samples_are_in_the_log_and_survive_a_kill(dropping, tokenizer, tmp_path):
    given = dict(sample_prompts=PROMPTS, sample_tokens=3)
    long_run(dropping, tokenizer, tmp_path / "whole", log="jsonl", **given)
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path / "cut", log=["jsonl", stop_at(3)], **given)
    long_run(dropping, tokenizer, tmp_path / "cut", log="jsonl", resume=True, **given)
    whole, cut = (
        [json.loads(line).get("samples") for line in (tmp_path / n / "log.jsonl").open()]
        for n in ("whole", "cut")
    )
    assert whole == cut and len([s for s in whole if s]) == 3


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_a_table(model, tokenizer, monkeypatch, name):
    module = Recorder(name)
    module.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, name, module)
    given = dict(max_steps=1, sample_prompts=PROMPTS, sample_tokens=2, log=name)
    train(model, tokenizer, ROWS, **given, **QUIET)
    (figures,) = next(args for call, args, _ in module.calls if call == "log")
    columns, rows = figures["samples"]
    assert columns == ["prompt", "text"]
    assert [row[0] for row in rows] == ["def walk(top):", "def f(x):"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(sample_prompts=["x " * 70]), r"sample_prompts\[0\].*more than max_seq_length=64"),
        (dict(sample_prompts=[3]), "sample_prompts=.*expected None or a list of prompts"),
        (dict(sample_prompts=["x"], sample_tokens=0), "sample_tokens=0: expected"),
        (dict(sample_prompts=["x"], eval_every=1, early_stopping=1), "without eval_data"),
        (dict(eval_every=1), "without eval_data or sample_prompts"),
    ],
)
def test_bad_prompts_are_refused_before_any_work(model, tokenizer, given, message):
    call = getattr(train, "__wrapped__", train)
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer, ROWS, **given, **QUIET)
