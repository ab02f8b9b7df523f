"""One writer for each name that `log` takes: a context that gives a function of a record."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.checkpoints.tensors import write_json, write_text
from fastlora.training.history import Record
from fastlora.training.logging.extras import extra_module

JSONL_FILE, TENSORBOARD_FOLDER = "log.jsonl", "tensorboard"
RUN_RECORD = "run.json"
SAMPLES = "samples"  # the entry of a record that is not a number: [{"prompt": ..., "text": ...}]

# The project of trackio, which needs one. Weights & Biases has its own default and variable for it.
_PROJECT = "fastlora"

Write = Callable[[Record], object]


class RunInfo(NamedTuple):
    """The facts about a run that a writer needs."""

    folder: Path | None
    records: Sequence[Record]  # of the steps that an earlier part of this run took
    settings: Mapping[str, Any]  # JSON values, shown beside the curves
    record: Mapping[str, Any]  # the present content of run.json; empty without a folder


@contextmanager
def jsonl(info: RunInfo) -> Iterator[Write]:
    """Append one JSON object per step to log.jsonl, which holds the whole run.

    A run that resumes first rewrites the steps before, so that steps which a killed run logged but
    did not save appear once. Every line is flushed. run.json is written first: scripts/watch.py
    reads the number of steps and the settings there while the run goes on.
    """
    assert info.folder is not None
    path = info.folder / JSONL_FILE
    info.folder.mkdir(parents=True, exist_ok=True)
    write_json(info.folder / RUN_RECORD, dict(info.record))
    write_text(path, "".join(map(_line, info.records)))
    with path.open("a", encoding="utf-8") as file:

        def write(record: Record) -> None:
            file.write(_line(record))
            file.flush()

        yield write


def shown(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as one text; of a chat, the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


@contextmanager
def tensorboard(info: RunInfo) -> Iterator[Write]:
    """Write event files to the folder "tensorboard" of the run, through torch.utils.tensorboard."""
    assert info.folder is not None
    module = extra_module("torch.utils.tensorboard", "tensorboard", 'log="tensorboard"')
    # TensorBoard then hides steps from here on that a killed run wrote and did not save.
    first = len(info.records) + 1
    writer = module.SummaryWriter(str(info.folder / TENSORBOARD_FOLDER), purge_step=first)
    try:
        writer.add_text("settings", f"```\n{json.dumps(info.settings, indent=2)}\n```", first)

        def write(record: Record) -> None:
            for name, value in record.items():
                if name not in ("step", SAMPLES):
                    writer.add_scalar(name, value, record["step"])
            for number, sample in enumerate(record.get(SAMPLES, [])):
                # Indented text is shown as it is: the texts are not Markdown.
                text = "    " + f"{shown(sample['prompt'])} >>> {sample['text']}".replace(
                    "\n", "\n    "
                )
                writer.add_text(f"{SAMPLES}/{number}", text, record["step"])

        yield write
    finally:
        writer.close()


@contextmanager
def _wandb_like(name: str, info: RunInfo, **more: Any) -> Iterator[Write]:
    """Weights & Biases, and trackio, which has the same three calls.

    A run that the user has started is used and stays open.
    """
    module = extra_module(name, name, f'log="{name}"')
    running = name == "wandb" and module.run is not None  # trackio.run is a module
    if not running:
        given = {} if info.folder is None else {"name": info.folder.name}
        module.init(config=dict(info.settings), **given, **more)
    try:

        def write(record: Record) -> None:
            figures = {key: value for key, value in record.items() if key != "step"}
            if SAMPLES in record:
                rows = [[shown(sample["prompt"]), sample["text"]] for sample in record[SAMPLES]]
                figures[SAMPLES] = module.Table(columns=["prompt", "text"], data=rows)
            module.log(figures, step=record["step"])

        yield write
    finally:
        if not running:
            module.finish()


def wandb(info: RunInfo) -> Any:
    """Log to Weights & Biases. A run that resumes is a new one there, from its first new step."""
    return _wandb_like("wandb", info)


def trackio(info: RunInfo) -> Any:
    """Log to trackio, which keeps its figures on this machine."""
    return _wandb_like("trackio", info, project=_PROJECT)
