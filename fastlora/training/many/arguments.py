"""The arguments of `train` with a list of models: each run's own, and the checks of all of them."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastlora.arguments import PATH, describe, settings_from
from fastlora.data.sources import DATA
from fastlora.errors import raise_problems
from fastlora.models.input_checks import MODEL
from fastlora.models.stacking import stack_problems
from fastlora.models.state import ModelState
from fastlora.training.logging.open import log_entries
from fastlora.training.settings import HEADING, Settings, memory_problems, train_problems

# Arguments that may be a list with one value for each model. All others are shared.
_OWN = ("max_steps", "num_epochs", "learning_rate", "learning_rates", "lr_scheduler")
_OWN += ("lr_scheduler_kwargs", "warmup_ratio", "weight_decay", "max_grad_norm", "optimizer")
_OWN += ("eval_every", "save_every", "keep", "keep_best", "early_stopping", "seed", "resume")

# Shared arguments that have lists as values.
_LISTS = ("sample_prompts", "log")

# Loggers that have one run in a process.
_ONE_RUN = ("wandb", "trackio")

# {run: losses of eval_data so far}, of the runs that go on -> those that end now.
Ending = Callable[[dict[int, list[float]]], Sequence[int]]


@dataclass(frozen=True, slots=True)
class OwnArguments:
    """The arguments of one run."""

    model: Any
    settings: Settings
    data: Any
    eval_data: Any
    output_dir: Path | None
    resume: Any


def are_several(model: Any) -> bool:
    """Whether `model` is a list of models; a tuple may also be the result of `load`."""
    are_models = isinstance(model, tuple) and all(isinstance(x, ModelState) for x in model)
    return isinstance(model, list) or (are_models and len(model) > 0)


def own_arguments(given: Mapping[str, Any]) -> tuple[list[OwnArguments], Ending | None]:
    """The arguments of each run, checked, and the function that `early_stopping` may be.

    Args:
        given: the arguments of `train` by name; "model" is a list.

    Raises:
        ValueError: listing every argument that `train` cannot use, with what is expected.
        ModuleNotFoundError: bitsandbytes or an extra that `log` names is not installed.
    """
    models, given = given["model"], dict(given)
    ending: Any = None
    n, problems = len(models), []
    if n == 0:
        problems.append("model=[]: expected one model or more")
    if callable(given["early_stopping"]):
        problems += _ending_problems(given)
        ending = given["early_stopping"]
        given["early_stopping"] = None
    columns: dict[str, list[Any]] = {"model": [*models]}
    for name, value in given.items():
        if name != "model":
            columns[name], more = _column(name, value, n)
            problems += more
    raise_problems(ValueError, HEADING, problems, shown=20)
    rows = [{name: column[i] for name, column in columns.items()} for i in range(n)]
    problems = _row_problems(rows) + _joint_problems(rows)
    raise_problems(ValueError, HEADING, problems, shown=20)
    held: dict[int, list[Any]] = {}  # id of an iterator -> its rows
    return [
        OwnArguments(
            row["model"],
            settings_from(Settings, row),
            _kept(row["data"], held),
            _kept(row["eval_data"], held),
            None if row["output_dir"] is None else Path(row["output_dir"]),
            row["resume"],
        )
        for row in rows
    ], ending


def _kept(data: Any, held: dict[int, list[Any]]) -> Any:
    """Rows in place of an iterator, which is read once although several runs share it."""
    if not isinstance(data, Iterator):
        return data
    if id(data) not in held:
        held[id(data)] = list(data)
    return held[id(data)]


def _column(name: str, value: Any, n: int) -> tuple[list[Any], list[str]]:
    """(one value for each run, problems)."""
    shared = [value] * n
    if name in ("data", "eval_data"):
        return (list(value), _length_problems(name, value, n)) if _one_each(value) else (shared, [])
    if not isinstance(value, list | tuple):
        if name == "output_dir" and PATH.accepts(value):
            return [Path(value) / f"run-{i}" for i in range(n)], []
        if name == "resume" and n > 1 and PATH.accepts(value) and value != "auto":
            problem = f"resume={os.fspath(value)!r}: a checkpoint is of one run; give a list"
            return shared, [problem]
        return shared, []
    if name in _OWN or name == "output_dir":
        return list(value), _length_problems(name, value, n)
    if name in _LISTS:
        return shared, []
    return shared, [f"{name}={describe(value)}: all models share it; expected one value"]


def _one_each(data: Any) -> bool:
    """Whether data are a list with the data of each run, and not a list of rows."""
    is_list = isinstance(data, list | tuple) and len(data) > 0
    return is_list and all(x is None or DATA.accepts(x) for x in data)


def _length_problems(name: str, value: Sequence[Any], n: int) -> list[str]:
    if len(value) == n:
        return []
    problem = f"{name} is a list of {len(value)} for {n} models; expected one value, or one each"
    if name in ("data", "eval_data"):
        problem += (
            ". Several sources for every run are [[a, b]] * number of models, or a dict"
            " {source: weight}"
        )
    return [problem]


def _row_problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The problems of each run alone. One that all runs have is given once."""
    names = ("model", "tokenizer", "data", "eval_data", "output_dir", "resume", "log", "progress")
    of_runs = [
        train_problems(settings_from(Settings, row), **{name: row[name] for name in names})
        for row in rows
    ]
    common = [line for line in of_runs[0] if all(line in lines for lines in of_runs)]
    return common + [
        f"run {i}: {line}"
        for i, lines in enumerate(of_runs)
        for line in lines
        if line not in common
    ]


def _joint_problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why these runs cannot be one pass."""
    first, models, problems = rows[0], [row["model"] for row in rows], []
    if not all(map(MODEL.accepts, models)):
        return []  # its rule reports it
    if all(model.adapter is not None for model in models):
        problems += [f"{line}; a pass runs one stack" for line in stack_problems(models)]
    if first["loss"] != "sft":
        problems.append(
            f"loss={describe(first['loss'])}: several models are trained with loss='sft'; train"
            " these one by one"
        )
    problems += [
        f"{name}={describe(first[name])}: private runs are trained one by one"
        for name in ("clip_per_example", "noise_multiplier")
        if first[name] is not None
    ]
    if first["context_parallel"] != 1:
        problems.append(
            f"context_parallel={describe(first['context_parallel'])}: several models are trained on"
            " one rank"
        )
    folders = [
        os.path.abspath(row["output_dir"]) for row in rows if PATH.accepts(row["output_dir"])
    ]
    if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
        problems.append(f"output_dir has {', '.join(twice)} twice; expected a folder for each run")
    problems += [
        f"log={name!r} has one run in a process; expected 'jsonl', 'tensorboard' or a function,"
        " whose records have the number of their run under 'run'"
        for name in log_entries(first["log"])
        if isinstance(name, str) and name in _ONE_RUN
    ]
    return problems or _memory_problems(rows)


def _memory_problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Refuse what the rows of all runs need together, as `settings.memory_problems`."""
    settings = settings_from(Settings, rows[0])
    if type(settings.batch_size) is not int:
        return []  # its rule reports it
    whole = replace(settings, batch_size=settings.batch_size * len(rows))
    own = memory_problems(settings, rows[0]["model"])
    return [] if own else memory_problems(whole, rows[0]["model"])


def _ending_problems(given: Mapping[str, Any]) -> list[str]:
    """What `early_stopping` as a function needs."""
    needed = {name: given[name] for name in ("eval_every", "eval_data") if given[name] is None}
    if isinstance(given["eval_every"], list | tuple):
        return ["early_stopping is a function of all runs' evaluations; give one eval_every"]
    return [f"early_stopping is a function of evaluations; give {name}" for name in needed]
