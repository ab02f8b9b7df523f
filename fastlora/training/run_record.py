"""run.json: all that a run's result depends on, and the result, as JSON for people and scripts.

    {"settings": every argument of train that is a number or a choice,
     "steps": of the whole run,
     "model": name, revision, fingerprint, dtype, ..., "lora": its settings,
     "adapter": fingerprints before and after the run,
     "data": name, source, fingerprint and size, "eval_data": the same or null,
     "versions": of Python and packages, "device": name, threads or capability,
     "result": steps, losses, seconds, when it ended}

It is written after the last step, and with log="jsonl" also before the first, without "ended".
training_run.json, which `train` itself reads, has the whole history.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from fastlora.losses.loss_argument import loss_identity
from fastlora.models.params import quantized_to
from fastlora.models.state import ModelState, require_adapter
from fastlora.training.history import Record
from fastlora.training.identity import hash_adapter, hash_sequences
from fastlora.training.keeping import best_step
from fastlora.training.run import Run, Sequences

# Packages that compute, or that turn text into numbers. Those that are not installed are left out.
_PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors", "jinja2", "bitsandbytes")


def run_record(
    run: Run,
    model: ModelState,
    data: Any,
    eval_data: Any,
    records: Sequence[Record],
    identity: Mapping[str, Any],
    initial: str,
    ended: bool,
) -> dict[str, Any]:
    """The content of run.json.

    Args:
        run: its settings and sequences.
        model: in its present state.
        data: the argument of `train`, for its name.
        eval_data: the same.
        records: of the steps so far.
        identity: of the run.
        initial: fingerprint of the adapter before the first step.
        ended: whether the run has ended.
    """
    lora, _ = require_adapter(model)
    spec = model.spec
    content = {
        "settings": json_settings(run.settings),
        "steps": run.steps,
        "model": {
            "name": spec.name_or_path,
            "revision": spec.revision,
            "fingerprint": identity["hash of the base model"],
            "dtype": str(model.base["norm"].dtype).removeprefix("torch."),
            "quantized_to": quantized_to(model.base),
            "max_seq_length": spec.max_seq_length,
            "recompute": spec.recompute,
            "kernels": spec.kernels,
            "compile": spec.compile,
            "deterministic": spec.deterministic,
        },
        # The resolved targets are in adapter_config.json.
        "lora": {f.name: getattr(lora, f.name) for f in fields(lora) if f.name != "targets"},
        "adapter": {"initial": initial, "trained": hash_adapter(model) if ended else None},
        "data": _training_data(data, run, records, identity["hash of the training data"]),
        "eval_data": None if eval_data is None else _eval_data(eval_data, run.eval_sequences),
        "versions": versions(),
        "device": device(model.base["norm"].device),
        "result": _result(records) | (_end() if ended else {}),
    }
    return json.loads(json.dumps(content, default=_as_json))


def json_settings(settings: Any) -> dict[str, Any]:
    """A settings record as JSON values; functions become their names."""
    given = {f.name: getattr(settings, f.name) for f in fields(settings)}
    if not isinstance(given["loss"], str):
        given["loss"] = loss_identity(given["loss"])
    return json.loads(json.dumps(given, default=_as_json))


def _as_json(value: Any) -> Any:
    """A value that JSON does not have: dicts of other classes, records, functions."""
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name else repr(value)[:200]


def source_name(data: Any) -> str:
    """The name of a file or folder of rows without its path; for other data, the class."""
    if isinstance(data, str | os.PathLike):
        return Path(data).name
    if isinstance(data, Mapping):  # sources with their weights
        return ", ".join(f"{source_name(source)} x {weight}" for source, weight in data.items())
    return type(data).__name__


def _source(data: Any) -> Any:
    """Paths of the data from which a run can be repeated, absolute; None: rows in memory."""
    if isinstance(data, str | os.PathLike):
        return os.path.abspath(data)
    if isinstance(data, Mapping):
        sources = {_source(source): weight for source, weight in data.items()}
        return None if None in sources else sources
    if isinstance(data, list | tuple) and data:
        sources = [_source(x) if isinstance(x, str | os.PathLike) else None for x in data]
        return None if None in sources else sources
    return None


def _eval_data(data: Any, sequences: Sequences) -> dict[str, Any]:
    return _data(data, sequences, hash_sequences(sequences))


def _training_data(
    data: Any, run: Run, records: Sequence[Record], fingerprint: str
) -> dict[str, Any]:
    """Of a stream, the sequences that were used, and the tokens that were trained."""
    if run.stream is None:
        return _data(data, run.sequences, fingerprint)
    s = run.settings
    return {
        "name": source_name(data),
        "source": _source(data),
        "fingerprint": fingerprint,
        "sequences": len(records) * run.rows * s.gradient_accumulation_steps,
        "tokens": sum(record["tokens"] for record in records),
        "streamed": True,
    }


def _data(data: Any, sequences: Sequences, fingerprint: str) -> dict[str, Any]:
    return {
        "name": source_name(data),
        "source": _source(data),
        "fingerprint": fingerprint,
        "sequences": len(sequences),
        "tokens": sum(len(sequence.input_ids) for sequence in sequences),
    }


def versions() -> dict[str, str]:
    """Name -> version, of Python, fastlora and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    # Not imported at the top: the package's __init__.py imports this file.
    found["fastlora"] = import_module(__name__.partition(".")[0]).__version__
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device(at: torch.device) -> dict[str, Any]:
    """The device, with what changes its rounding: threads of a CPU, the CUDA version of a GPU."""
    if at.type != "cuda":
        threads = torch.get_num_threads()
        return {"type": at.type, "name": platform.machine(), "threads": threads}
    name, capability = torch.cuda.get_device_name(at), torch.cuda.get_device_capability(at)
    return {"type": "cuda", "name": name, "capability": capability, "cuda": torch.version.cuda}


def _end() -> dict[str, str]:
    return {"ended": datetime.now(UTC).isoformat(timespec="seconds")}


def _result(records: Sequence[Record]) -> dict[str, Any]:
    """Losses of the first, last and best step, and the time that the steps took."""
    if not records:
        return {"steps": 0}
    evaluations = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    result = {
        "steps": len(records),
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
        "trained_tokens": sum(r["tokens"] for r in records),
        "seconds": sum(r["seconds"] for r in records),
    }
    if (best := best_step(records)) is not None:
        result |= {"last_eval_loss": [*evaluations.values()][-1], "best_step": best}
        result |= {"best_eval_loss": evaluations[best]}
    return result
