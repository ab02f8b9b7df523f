"""Loads a base and its adapters, as one model whose adapter is a stack (stacking.py)."""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fastlora
from fastlora.errors import raise_problems
from fastlora.generation.text import text_stop_ids
from fastlora.models.state import ModelState
from serving.stacking import stack


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The models that the server and the chat run."""

    model: ModelState  # the adapter is a stack; None without adapters
    tokenizer: fastlora.Tokenizer
    adapter_ids: dict[str, int]  # name -> number in the stack; the first name is the base's

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a reply."""
        config = self.model.spec.config
        return tuple(text_stop_ids(self.tokenizer, config.eos_token_id, config.vocab_size))


def add_model_arguments(add: Callable[..., Any]) -> None:
    """The arguments of a command that name the base and its adapters; `add` is add_argument."""
    add("model", help='"demo", a model or adapter folder, or a Hub id')
    add(
        "--adapter", type=named_folder, action="append", default=[], metavar="NAME=FOLDER",
        help="a PEFT folder or Hub id over the model; may be given several times",
    )  # fmt: skip
    add("--load-in-4bit", action="store_true", help="quantise the base to NF4")


def named_folder(text: str) -> tuple[str, str]:
    """A command's argument NAME=FOLDER as a pair."""
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=FOLDER")
    return name, folder


def load_served(
    name_or_path: str,
    adapters: Sequence[tuple[str, str]],
    *,
    name: str | None = None,
    load_in_4bit: bool = False,
    max_seq_length: int | None = None,
) -> Served:
    """Load a base and adapters over it.

    Args:
        name_or_path: a folder, a Hub id or "demo". If it is an adapter's, its base is loaded too,
            and both are served.
        adapters: pairs of a name and a PEFT folder or Hub id.
        name: of the base; None is the last part of `name_or_path`.
        load_in_4bit: quantise the base to NF4.
        max_seq_length: longest prompt and reply together; None is the model's.

    Raises:
        ValueError: the folder has no tokenizer, a name is given twice, or an adapter cannot share
            a batch with others. Lists all problems.
        FileNotFoundError, CheckpointError: as `fastlora.load` and `load_adapter`.
    """
    dtype = "auto" if torch.cuda.is_available() else "float32"  # bfloat16 is slow on most CPUs
    model, tokenizer = fastlora.load(
        name_or_path, dtype=dtype, load_in_4bit=load_in_4bit, max_seq_length=max_seq_length
    )
    if tokenizer is None:
        raise ValueError(f"{name_or_path} has no tokenizer.json; serving text needs one.")
    base = fastlora.disable(model)
    named = {} if model.adapter is None else {_last_part(name_or_path): model}
    base_name = name or _last_part(model.spec.name_or_path if named else name_or_path)
    counts = Counter([base_name, *named, *(n for n, _ in adapters)])
    problems = [f"the name {n!r} is used twice" for n in sorted(counts) if counts[n] > 1]
    raise_problems(ValueError, "these models cannot be served:", problems)
    named |= {n: fastlora.load_adapter(base, folder) for n, folder in adapters}
    stacked = stack(base, named) if named else base
    ids = {n: i for i, n in enumerate((base_name, *named))}
    return Served(model=stacked, tokenizer=tokenizer, adapter_ids=ids)


def _last_part(name_or_path: str) -> str:
    return name_or_path.rstrip("/").split("/")[-1]
