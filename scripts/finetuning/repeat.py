"""Repeating a run from its run.json: the options, and what differs afterwards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastlora.checkpoints.tensors import read_json, write_json
from fastlora.training.logging.backends import RUN_RECORD
from fastlora.training.output_folder import RUN_FILE

OPTIONS = "finetune"  # the entry of run.json that holds this script's options

# Options that belong to one call, and not to the run.
_OF_A_CALL = ("config", "repeat", "dry_run", "resume", "progress", "output")


def note_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Add the options to a run's run.json, from which `options_of_run` reads them."""
    record = read_json(folder / RUN_RECORD)
    kept = {name: value for name, value in options.items() if name not in _OF_A_CALL}
    # A path is repeated from another working directory too.
    absolute = lambda x: str(x.resolve()) if isinstance(x, Path) else x
    write_json(folder / RUN_RECORD, record | {OPTIONS: {k: absolute(v) for k, v in kept.items()}})


def options_of_run(path: Path) -> dict[str, Any]:
    """The options that repeat a run, and an output folder beside the run's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of a run whose data or settings were Python objects.
    """
    record = read_json(path)
    if missing := {"settings", "model", "lora", "data"} - record.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; is it a run.json of train?")
    given = record.get(OPTIONS) or _from_train(path, record)
    if record["device"]["type"] == "cpu":
        # The order of sums, and so their rounding, depends on it.
        torch.set_num_threads(record["device"]["threads"])
    run = path.resolve().parent
    return dict(given) | {"output": str(run.with_name(f"{run.name}-repeat"))}


def _from_train(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that another program than finetune.py made with `fastlora.train`."""
    sources = {name: (record[name] or {}).get("source") for name in ("data", "eval_data")}
    if not isinstance(sources["data"], str) or (record["eval_data"] and not sources["eval_data"]):
        raise ValueError(
            f"{path}: the data of this run was not one file or folder, so it cannot be read again;"
            " call fastlora.train with these settings"
        )
    settings = dict(record["settings"])
    # Functions are recorded by name; what they compute is not in the file.
    if unknown := [n for n in ("lr_scheduler", "optimizer", "loss") if "." in str(settings[n])]:
        raise ValueError(f"{path}: {', '.join(unknown)} of this run is a function or a record")
    lora = {k: v for k, v in record["lora"].items() if k != "extras"}
    for name in ("rank_pattern", "alpha_pattern"):
        lora[name] = dict(lora[name]) or None
    tokens = lora.get("trainable_token_indices") or None  # ids, or pairs of a module and its ids
    if tokens is not None and isinstance(tokens[0], list):
        tokens = dict(tokens)
    lora["trainable_token_indices"] = tokens
    model = {name: record["model"][name] for name in ("revision", "dtype", "max_seq_length")}
    precision = record["model"].get("quantized_to")
    own: dict[str, Any] = {"hold_out": False, "log": [], "load_in_4bit": precision == "4 bits"}
    own |= {"base_precision": "fp8"} if precision == "fp8" else {}
    lora["recompute"] = record["model"]["recompute"]
    return {**settings, **lora, **model, **sources, "model": record["model"]["name"], **own}


def differences(before: Path, after: Path) -> list[str]:
    """One line for each thing in which a repeated run differs from the first; [] for the same bits.

    Args:
        before: run.json of the first run.
        after: output folder of the second.
    """
    old, new = read_json(before), read_json(after / RUN_RECORD)
    if old["adapter"]["trained"] == new["adapter"]["trained"]:
        return []
    lines = []
    for part in ("versions", "device", "settings", "model", "lora"):
        names = old[part].keys() | new[part].keys()
        pairs = {n: (old[part].get(n), new[part].get(n)) for n in sorted(names)}
        lines += [f"{part}, {n}: {a!r} before, {b!r} now" for n, (a, b) in pairs.items() if a != b]
    for part in ("data", "eval_data"):
        a, b = ((run[part] or {}).get("fingerprint") for run in (old, new))
        lines += [f"{part}: fingerprint {a} before, {b} now"] if a != b else []
    if old["adapter"]["initial"] != new["adapter"]["initial"]:
        lines.append("the adapter before the first step: another seed or initialisation")
    history = lambda folder: json.loads((folder / RUN_FILE).read_text())["history"]
    figures = ("loss", "grad_norm", "learning_rate")
    for a, b in zip(history(before.parent), history(after), strict=False):
        if moved := [n for n in figures if a[n] != b[n]]:
            changes = ", ".join(f"{n} {a[n]!r} before, {b[n]!r} now" for n in moved)
            lines.append(f"from step {a['step']} on: {changes}")
            break
    return [*lines, "the trained adapter"]
