"""What a differentially private run needs of the other arguments of train, its rows and its noise.

One row of the data is one example, and the guarantee is for adding or removing one row. So every
row must be one sequence, must be drawn with the same probability in every step, and must not change
the gradient of another row.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fastlora.models.state import ModelState

# The default of train. Anybody can compute the noise of a run with this seed.
_PUBLIC_SEED = 3407


def private_problems(settings: Any, data: Any, model: Any) -> list[str]:
    """Arguments of train that a private run cannot use.

    Args:
        settings: a `Settings` record.
        data: the argument of train.
        model: the argument of train.
    """
    clip, noise = settings.clip_per_example, settings.noise_multiplier
    if clip is None and noise is None:
        return []
    if clip is None or noise is None:
        return [
            f"clip_per_example={clip!r} and noise_multiplier={noise!r}: give both;"
            " noise_multiplier=0 clips without noise, which is not private"
        ]
    refused = {
        "packing=True: a private run needs packing=False, one row a sequence": settings.packing,
        f"loss={settings.loss!r:.40}: a private run minimises 'sft'": settings.loss != "sft",
        "too_long='split': the parts of a row would be examples of their own; use 'drop'"
        " or 'truncate'": settings.too_long == "split",
        "data with weights repeats some rows; a private run draws all with the same probability, so"
        " give a list": isinstance(data, Mapping),
        "the base is float16, whose gradients overflow; use bfloat16 or float32": _is_half(model),
    }
    return [reason for reason, present in refused.items() if present]


def _is_half(model: Any) -> bool:
    return isinstance(model, ModelState) and model.base["norm"].dtype == torch.float16


def check_private_rows(settings: Any, rows: int, *, streamed: bool) -> None:
    """Check the number of rows of a private run.

    Raises:
        ValueError: the data are streamed, or there are fewer rows than a step is expected to have.
    """
    if streamed:
        raise ValueError(
            "data are streamed, but clip_per_example draws from all rows in every step; give a part"
            " of them, such as data=list(stream.take(100_000))"
        )
    expected = expected_batch(settings)
    if expected > rows:
        raise ValueError(
            f"a step is expected to have batch_size x gradient_accumulation_steps = {expected}"
            f" rows, but the data have {rows}; lower them so that their product is at most {rows}"
        )


def expected_batch(settings: Any) -> int:
    """The expected number of rows in a step, by which the noisy sum is divided."""
    return settings.batch_size * settings.gradient_accumulation_steps


def warn_of_noise(settings: Any, model: ModelState) -> None:
    """Warn if the noise is larger than the gradient can be, or can be computed by anybody."""
    parameters = sum(x.numel() for x in tree_leaves(model.adapter))
    expected = expected_batch(settings)
    ratio = settings.noise_multiplier * math.sqrt(parameters) / expected
    if ratio > 1:
        warnings.warn(
            f"the noise drowns the signal: its norm is {ratio:.1f} times the largest that the mean"
            f" of the clipped gradients can have (noise_multiplier * sqrt({parameters:,} trained"
            f" numbers) / {expected} rows). Train fewer numbers (a smaller r, fewer"
            " target_modules), draw more rows in a step (gradient_accumulation_steps), or lower"
            " noise_multiplier.",
            stacklevel=4,
        )
    if settings.noise_multiplier and settings.seed == _PUBLIC_SEED:
        warnings.warn(
            f"seed={_PUBLIC_SEED} is the default, so anybody can compute the noise and subtract it;"
            " pass a secret one, such as secrets.randbits(63), and publish no file that holds it"
            " (training_run.json, run.json, README.md, checkpoints).",
            stacklevel=4,
        )
