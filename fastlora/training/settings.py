"""settings."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fastlora.data.examples import Example
from fastlora.model import Model
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.optimizers import OPTIMIZERS

SCHEDULERS = ("cosine", "linear", "constant")

_LARGEST_MASK_GIB = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of `train` that are numbers and choices, under their names there."""

    max_steps: int | None
    num_epochs: float
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float | None
    optimizer: str
    packing: bool
    train_on: str
    eval_every: int | None
    save_every: int | None
    seed: int


# ── 5. what is refused ────────────────────────────────────────────────────────────────────
def _is_whole(x: Any, low: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= low


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


_OPTIONAL_COUNT = (lambda x: x is None or _is_whole(x, 1), "None or a whole number >= 1")

_COUNT = (lambda x: _is_whole(x, 1), "a whole number >= 1")

_POSITIVE = (lambda x: _is_number(x) and x > 0, "a number > 0")


# Argument -> (whether a value can be, what is expected).
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_steps": _OPTIONAL_COUNT,
    "num_epochs": _POSITIVE,
    "batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": _POSITIVE,
    "lr_scheduler": (lambda x: x in SCHEDULERS, " or ".join(map(repr, SCHEDULERS))),
    "warmup_ratio": (lambda x: _is_number(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "weight_decay": (lambda x: _is_number(x) and x >= 0, "a number >= 0"),
    "max_grad_norm": (
        lambda x: x is None or (_is_number(x) and x >= 0),
        "a number > 0; or None or 0 for no clipping",
    ),
    "optimizer": (lambda x: x in OPTIMIZERS, " or ".join(map(repr, OPTIMIZERS))),
    "packing": (lambda x: isinstance(x, bool), "True or False"),
    "train_on": (lambda x: x in ("responses", "all"), "'responses' or 'all'"),
    "eval_every": _OPTIONAL_COUNT,
    "save_every": _OPTIONAL_COUNT,
    "seed": (lambda x: _is_whole(x, 0), "a whole number >= 0"),
}


def setting_problems(settings: Settings) -> list[str]:
    return [
        f"{name}={value!r}: expected {_RULES[name][1]}"
        for name, value in asdict(settings).items()
        if not _RULES[name][0](value)
    ]


def model_problems(model: Model, tokenizer: Tokenizer | None) -> list[str]:
    problems = []
    if model.adapter is None:
        problems.append("model has no adapter to train; call fastlora.lora(model) first")
    elif any(x.dtype == torch.float16 for x in tree_leaves(model.adapter)):
        # B starts at zero, so A's first gradient is zero, and 0 / (sqrt(0) + eps) is NaN.
        problems.append(
            "model's adapter is float16, or copies of a float16 base, where AdamW's eps = 1e-8 is "
            "0; expected fastlora.lora(..., adapter_dtype='float32') and a bfloat16 base"
        )
    if tokenizer is None:
        problems.append(
            "tokenizer is None; rows cannot become tokens without one. Has the model's folder a "
            "tokenizer.json?"
        )
    return problems


def companion_problems(
    settings: Settings, eval_data: Any, folder: Path | None, resume: Any
) -> list[str]:
    """Arguments that mean nothing without another."""
    problems = []
    if settings.eval_every is not None and eval_data is None:
        problems.append(f"eval_every={settings.eval_every!r} without eval_data")
    if settings.save_every is not None and folder is None:
        problems.append(f"save_every={settings.save_every!r} without output_dir")
    if resume is True and folder is None:
        problems.append("resume=True without output_dir; name it, or the checkpoint in resume=...")
    if not isinstance(resume, bool | str | os.PathLike):
        problems.append(f"resume={resume!r}: expected True, False or the path of a checkpoint")
    return problems


def mask_problems(settings: Settings, length: int) -> list[str]:
    """A context of 131,072 tokens, never lowered, would ask for a mask of 16 GiB a sequence."""
    if settings.packing is not True or not _is_whole(settings.batch_size, 1):
        return []
    gib = settings.batch_size * length**2 / 2**30
    if gib <= _LARGEST_MASK_GIB:
        return []
    return [
        f"packing to max_seq_length={length} at batch_size={settings.batch_size} needs an attention"
        f" mask of {gib:.0f} GiB; pass fastlora.load a max_seq_length that your rows fill, such as"
        " 2048, or packing=False"
    ]


def check_vocabulary(examples: Sequence[Example], vocab_size: int) -> None:
    largest = max(int(example.input_ids.max()) for example in examples)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives id {largest}, but the model's vocabulary is [0, {vocab_size}); "
            "do model and tokenizer come from the same folder?"
        )
