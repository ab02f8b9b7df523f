"""Rows, settings and helpers that the tests of training share."""

import dataclasses
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

from fastlora.model import Model
from fastlora.training.history import History
from fastlora.training.loop import train
from fastlora.training.settings import Settings

WORDS = "a rank is the number of rows that a matrix needs to say all it has to say".split()
LENGTHS = (3, 14, 5, 9, 1, 12, 7, 2, 11, 6)

ROWS = [
    {"prompt": f"{n}:", "completion": " " + " ".join((WORDS * 2)[n : n + length])}
    for n, length in enumerate(LENGTHS)
]

QUIET = dict(progress=False, warmup_ratio=0.0)


def timeless(history: History) -> History:
    return dataclasses.replace(history, seconds=())


LONG = dict(
    max_steps=6,  # ten rows in steps of four: the second epoch begins with step 4
    batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    weight_decay=0.1,
    packing=False,
    eval_every=2,
    save_every=2,
    progress=False,
)


class Killed(BaseException):
    pass


def long_run(model: Model, tokenizer: Any, folder: Path, **changed: Any) -> tuple[Model, History]:
    given = LONG | dict(output_dir=folder, eval_data=ROWS[:3]) | changed
    return train(model, tokenizer, given.pop("data", ROWS), **given)


def stop_at(step: int):
    def log(record: dict) -> None:
        if record["step"] == step:
            raise Killed

    return log


def settings(**changed: Any) -> Settings:
    """train's default settings, with some changed."""
    defaults = {name: p.default for name, p in inspect.signature(train).parameters.items()}
    names = [field.name for field in dataclasses.fields(Settings)]
    return Settings(**{name: defaults[name] for name in names} | changed)


class Recorder(ModuleType):
    """A module in place of wandb or trackio, or of torch.utils.tensorboard."""

    def __init__(self, name: str):
        super().__init__(name)
        self.run, self.calls = None, []
        for call in ("init", "log", "finish"):
            note = lambda *args, call=call, **given: self.calls.append((call, args, given))
            setattr(self, call, note)
