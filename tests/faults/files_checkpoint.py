"""Damaged files of a training checkpoint, and runs that are not the checkpoint's.

A damaged file is refused by its name, or has no effect: the resumed run gives the same bits.
"""

import json
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from faults.case import Case, Context
from faults.damage import BYTES, JSON_FILE, WRONG_JSON, another, replaced

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER, STATE = "optimizer.safetensors", "trainer_state.json"
STEPS, AT = 4, "checkpoint-2"


def settings(**changed: Any) -> dict[str, Any]:
    """Arguments of the run."""
    return dict(max_steps=STEPS, save_every=2) | changed


@lru_cache(maxsize=4)
def finished(context: Context, seed: int = 3407) -> Path:
    """A run's folder, all steps done."""
    folder = context.good.parent / f"run-{seed}-{id(context)}"
    shutil.rmtree(folder, ignore_errors=True)
    context.train(**settings(output_dir=folder, seed=seed))
    return folder


def interrupted(context: Context) -> Path:
    """A copy of the run that ends at checkpoint-2."""
    source = finished(context)
    folder = context.cwd / "run"
    folder.mkdir()
    shutil.copytree(source / AT, folder / AT)
    context.logged.clear()
    return folder


def same_bits(context: Context, _: Any) -> str | None:
    """For `Case.accepts`."""
    run, whole = context.cwd / "run", finished(context)
    for name in (ADAPTER, f"checkpoint-{STEPS}/{OPTIMIZER}"):
        if (run / name).read_bytes() != (whole / name).read_bytes():
            return f"resumed to another {name}"
    if history(run) != history(whole):
        return "resumed to another history"
    return None


def history(run: Path) -> list[Any]:
    """The records of a finished run, without their seconds."""
    records = json.loads((run / f"checkpoint-{STEPS}" / STATE).read_text())["history"]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def _named(name: str) -> str:
    """A changed setting in trainer_state.json looks like another run's."""
    return f"{name}||another run" if name == STATE else name


def _case(what: str, name: str, damage: Any, item: str = "C1") -> Case:
    def call(context: Context) -> Any:
        run = interrupted(context)
        damage(context, run / AT / name)
        context.logged.clear()  # the damage may have trained another run
        return context.train(**settings(output_dir=run, resume=True))

    # Without one of its files a checkpoint is incomplete, and the message names the folder.
    gone = what in ("absent", "a folder", "a dangling link", "a link to itself")
    named = ("checkpoint",) if gone else (_named(name),)
    return Case(f"checkpoint {name}, {what}", item, call, named, same_bits, every=4)


def cases() -> Iterator[Case]:
    """All of them."""
    files = (ADAPTER, CONFIG, OPTIMIZER, STATE)
    for name in files:
        for what, damage in BYTES.items():
            yield _case(what, name, lambda _, path, d=damage: d(path))
    for name in (CONFIG, STATE):
        for what, damage in JSON_FILE.items():
            yield _case(what, name, lambda _, path, d=damage: d(path))
    for name in files:
        of_other = lambda context, path: another(finished(context, 1) / AT / path.name)(path)
        yield _case("another run's", name, of_other)
        later = lambda context, path: another(
            finished(context) / f"checkpoint-{STEPS}" / path.name
        )(path)
        yield _case("a later step's", name, later)
    yield from _state_fields()


def _state_fields() -> Iterator[Case]:
    """Every figure of the history, and the two parts of trainer_state.json, of another type."""
    records = [("history", 1, key) for key in ("step", "loss", "learning_rate", "tokens")]
    records += [("history", 1, key) for key in ("seconds", "grad_norm", "eval_loss")]
    for keys in [("settings",), ("history",), ("history", 0), *records]:
        for what, value in WRONG_JSON.items():
            if (keys[-1], what) in (("seconds", "a half"), ("eval_loss", "null")):
                continue  # a right value
            if keys[-1] in ("loss", "learning_rate", "grad_norm", "eval_loss") and (
                what in ("minus one", "a half") or value is None
            ):
                continue  # a number that may be right, which only the file itself can tell
            path = ".".join(map(str, keys))
            yield _case(f"{path} is {what}", STATE, _replaced(keys, value))
    for what, change in {
        "a step left out": lambda records: records[:1] * 0 + records[1:],
        "a step twice": lambda records: [records[0], records[0]],
        "steps turned round": lambda records: records[::-1],
        "one step more": lambda records: [*records, records[-1]],
    }.items():
        yield _case(f"history, {what}", STATE, _changed(change))


def _replaced(keys: tuple[Any, ...], value: Any) -> Any:
    return lambda _, path: replaced(*keys, value=value)(path)


def _changed(change: Any) -> Any:
    def damage(_: Context, path: Path) -> None:
        whole = json.loads(path.read_text())
        path.write_text(json.dumps(whole | {"history": change(whole["history"])}))

    return damage
