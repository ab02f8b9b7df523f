"""The options of scripts/finetune.py: those of the script, of `fastlora.lora` and of `train`.

The fields come from the records that `lora` and `train` check their arguments with, the help from
their docstrings, so an argument that they get is an option too. Functions, records and loftq_config
cannot be options. Regular expressions for target_modules and exclude_modules, chats in
sample_prompts, and lists and dicts in template_kwargs and lr_scheduler_kwargs can be given in the
TOML file only.
"""

import argparse
import collections.abc
import dataclasses
import functools
import inspect
import operator
import re
import tomllib
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch

import fastlora
from fastlora.adapters.lora_arguments import LoraArguments
from fastlora.checkpoints.hub import DEMO
from fastlora.training.logging.extras import extra_module
from fastlora.training.settings import Settings
from finetuning.repeat import options_of_run

DESCRIPTION = (
    "Fine-tune a Llama with LoRA. Exit codes: 0 done; 1 an unexpected error; 2 an argument or a"
    " file that cannot be used; 3 a loss that is NaN or infinite; 4 memory or disk is full;"
    " 5 a repeated run gave other bits; 130, 143 stopped by SIGINT, SIGTERM after a save."
)

# Name -> (type, default, help), of the options that neither lora nor train has.
_OWN: dict[str, tuple[Any, Any, str]] = {
    "config": (Path | None, None, "TOML file with options; the command line goes before it"),
    "repeat": (Path | None, None, "run.json of a run: repeat it, and say what differs"),
    "model": (str, "demo", '"demo", a folder, or a Hub id'),
    "revision": (str | None, None, "of the model on the Hub"),
    "data": (Path, DEMO / "train.jsonl", "JSONL, Parquet, ...: chat, prompt, Alpaca, text"),
    "eval_data": (Path | None, None, "held-out rows; default: see --hold-out"),
    "hold_out": (
        bool,
        True,
        "without --eval-data, hold out one row in twenty (of two or more)",
    ),
    "output": (Path, Path("runs/adapter"), "PEFT folder to write, with checkpoints and run.json"),
    "dtype": (str | None, None, "of the base; default: the checkpoint's, on the CPU float32"),
    "load_in_4bit": (bool, False, "QLoRA: the base in NF4"),
    "base_precision": (str, "checkpoint", '"fp8": the base in e4m3, products in fp8'),
    "max_seq_length": (int | None, None, "default: 2048, or the model's if it is shorter"),
    "resume": (bool, False, "continue from the newest checkpoint in --output, if there is one"),
    "log": (tuple[str, ...], ("jsonl",), '"jsonl", "tensorboard", "wandb", "trackio"'),
    "progress": (bool, True, "show a bar"),
    "dry_run": (bool, False, "print the settings and the prediction, and train nothing"),
}

# Defaults that differ from those of lora and train.
_DEFAULTS: dict[str, Any] = {
    "r": 16,
    "num_epochs": 2,
    "batch_size": 4,
    "lora_alpha": None,
    "learning_rate": None,
}
_HELP = {
    "lora_alpha": "default: r",
    "trainable_token_indices": "rows of the embedding to train: ids; or names, each before its ids",
    "learning_rate": "default: 2e-4 * 2048 / hidden_size, which suits a model of any width",
}
# Types that differ from those of lora and train.
_KINDS: dict[str, Any] = {
    "lora_alpha": float | None,
    "learning_rate": float | None,
    "trainable_token_indices": tuple[int | str, ...] | None,  # see _token_ids
}
_ALIASES = {"num_epochs": ["--epochs"]}

# Arguments of lora that the script sets, or that have another name as an option.
_NOT_OF_LORA = {"random_state", "max_seq_length", "temporary_location"}
_NOT_OF_LORA |= {"use_gradient_checkpointing"}


def cli_type(annotation: Any) -> Any:
    """The part of an annotation that a command line can express; None if there is none."""
    origin, parameters = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return bool | int | float | str
    if origin in (typing.Union, types.UnionType):
        found = dict.fromkeys(t for part in parameters if (t := cli_type(part)) is not None)
        # One word is a list of one name, not a regular expression.
        if tuple[str, ...] in found:
            found.pop(str, None)
        return functools.reduce(operator.or_, found) if found else None
    if origin is collections.abc.Mapping:
        key, value = map(cli_type, parameters)
        return dict[key, value] if typing.get_origin(value) is not tuple else None
    if origin in (collections.abc.Sequence, collections.abc.Collection):
        item = str if parameters[0] is Any else parameters[0]
        return tuple[item, ...]
    simple = annotation in (str, int, float, bool, type(None)) or origin is typing.Literal
    return annotation if simple else None


def help_texts(function: Callable[..., Any]) -> dict[str, str]:
    """Argument -> its text in the docstring's section Args."""
    section = re.split(r"\n *Args:\n", inspect.getdoc(function) or "")[1]
    section = re.split(r"\n\n(?=Raises|Returns)", section)[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.M)
    return {name: " ".join(text.split()) for name, text in entries}


def _fields() -> list[tuple[str, Any, Any, str]]:
    """(name, type, default, help) of each option, in the order of the help."""
    found = [(name, *rest) for name, rest in _OWN.items()]
    for record, function, left_out in (
        (LoraArguments, fastlora.lora, _NOT_OF_LORA),
        (Settings, fastlora.train, set()),
    ):
        helps, parameters = help_texts(function), inspect.signature(function).parameters
        for f in dataclasses.fields(record):
            kind = cli_type(f.type)
            if kind is None or f.name in left_out:
                continue
            kind = _KINDS.get(f.name, kind)
            default = _DEFAULTS.get(f.name, parameters[f.name].default)
            text = _HELP.get(f.name, helps.get(f.name, ""))
            found.append((f.name, kind, default, text))
    return found


def arguments_for(record: type, options: Any) -> dict[str, Any]:
    """The options that are fields of a record: `Settings` or `LoraArguments`."""
    names = {f.name for f in dataclasses.fields(record)} - _NOT_OF_LORA - {"max_seq_length"}
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    if given["target_modules"] == ("all-linear",):  # a name for many, not a list of one
        given["target_modules"] = "all-linear"
    return {name: value for name, value in given.items() if name in names}


def parse(arguments: Sequence[str]) -> Any:
    """The options: the defaults, then those of --repeat, of --config, and of the command line.

    Raises:
        ValueError: a key of the TOML file is not an option, or run.json cannot be repeated.
        ModuleNotFoundError: tyro is not installed (extra `cli`).
    """
    tyro = extra_module("tyro", "cli", "scripts/finetune.py")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--repeat", type=Path)
    files, _ = first.parse_known_args(arguments)
    found = _fields()
    defaults = {name: default for name, _, default, _ in found}
    if files.repeat is not None:
        defaults |= _known(options_of_run(files.repeat), defaults, files.repeat)
    if files.config is not None:
        defaults |= _known(_read_toml(files.config), defaults, files.config)
    make = lambda name, kind, text: Annotated[
        kind, tyro.conf.arg(help=text, aliases=_ALIASES.get(name))
    ]
    # A default that a file gives may have a type that the option has not, such as a text for r:
    # lora or train reports it.
    cls = dataclasses.make_dataclass(
        "Options",
        [(n, make(n, kind, text), dataclasses.field(default=None)) for n, kind, _, text in found],
        frozen=True,
        kw_only=True,
    )
    options = cls(**defaults)
    with warnings.catch_warnings():
        # Of defaults of other types than the option's. They are kept as the file has them.
        warnings.filterwarnings("ignore", module=r"tyro\b")
        given = tyro.cli(cls, default=options, args=list(arguments), description=DESCRIPTION)
    tokens = _token_ids(given.trainable_token_indices)
    given = dataclasses.replace(given, trainable_token_indices=tokens)
    if given.lora_alpha is None:
        given = dataclasses.replace(given, lora_alpha=given.r)
    if given.dtype is None:
        # Most CPUs compute bfloat16 slower than float32.
        dtype = "auto" if torch.cuda.is_available() else "float32"
        given = dataclasses.replace(given, dtype=dtype)
    return given


def _token_ids(words: Any) -> Any:
    """`embed_tokens 1 2 lm_head 3` as a dict of ids. Ids alone stay a tuple, None stays None."""
    if not isinstance(words, tuple) or not words or not isinstance(words[0], str):
        return words
    ids: dict[str, list[int]] = {}
    name = words[0]
    for word in words:
        if isinstance(word, str):
            name = word
        ids.setdefault(name, []).extend([] if isinstance(word, str) else [word])
    return ids


def _read_toml(path: Path) -> dict[str, Any]:
    """The options of a TOML file. The names of its tables mean nothing, unless an option takes one.

    Raises:
        ValueError: it is not TOML.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    flat: dict[str, Any] = {}
    names = {name for name, *_ in _fields()}
    for key, value in content.items():
        in_table = isinstance(value, dict) and key.replace("-", "_") not in names
        flat |= value if in_table else {key: value}
    return flat


def _known(given: Mapping[str, Any], defaults: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Options from a file, with Python's names and types."""
    plain = {_ALIAS.get(key, key).replace("-", "_"): value for key, value in given.items()}
    if unknown := sorted(plain.keys() - defaults.keys()):
        raise ValueError(f"{path} has {', '.join(unknown)}: expected options of finetune.py")
    paths = {"data", "eval_data", "output", "config", "repeat"}
    convert = lambda name, value: (
        Path(value) if name in paths and isinstance(value, str)
        else tuple(value) if isinstance(value, list)
        else value
    )  # fmt: skip
    return {name: convert(name, value) for name, value in plain.items()}


_ALIAS = {"epochs": "num_epochs"}
