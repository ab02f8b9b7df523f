"""LoftQ: A and B that make up for the error of quantising W (Li et al. 2023, arXiv:2310.08659)."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.adapters.init.decompositions import low_rank_factors
from fastlora.arguments import Rule, describe, setting, setting_problems, whole_number
from fastlora.models.params import LoRA
from fastlora.ops.quant.dequantize import nf4_rounded


def int8_rounded(weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    """The matrix rounded to 8-bit integers and back, with one scale per row: max|row| / 127
    (Dettmers et al. 2022, arXiv:2208.07339, section 2; PEFT's 8 bits)."""
    step = weight.abs().amax(dim=-1, keepdim=True) / 127
    # The clamp keeps a row of zeros at 0 / tiny = 0; 0 / 0 would be NaN.
    return (weight / step.clamp(min=torch.finfo(weight.dtype).tiny)).round() * step


# Bits -> a function that quantises a matrix and returns it dequantised.
QUANTISERS: dict[int, Callable[[Tensor], Tensor]] = {4: nf4_rounded, 8: int8_rounded}


@dataclass(frozen=True, slots=True)
class LoftQSettings:
    """The fields of PEFT's LoftQConfig, with its defaults."""

    loftq_bits: int = setting(Rule(lambda x: type(x) is int and x in QUANTISERS, "4 or 8"), 4)
    loftq_iter: int = setting(whole_number(1, 1001), 1)  # an iteration decomposes every matrix


def loftq_settings(config: Any, init: bool | str) -> tuple[LoftQSettings, list[str]]:
    """(settings, problems) of the `loftq_config` that the user gave.

    Args:
        config: None or {} (the defaults), a dict, or PEFT's LoftQConfig.
        init: the value of init_lora_weights.
    """
    default = LoftQSettings()
    if config is None or (isinstance(config, dict) and not config):
        return default, []
    if init != "loftq":
        return default, [
            f"loftq_config={describe(config)} without init_lora_weights='loftq' has no effect; give"
            " both or neither"
        ]
    names = {f.name for f in fields(LoftQSettings)}
    # The fields of PEFT's LoftQConfig are read without importing PEFT.
    given = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    if given.keys() - names or (not isinstance(config, dict) and given.keys() != names):
        expected = "a dict such as {'loftq_bits': 4, 'loftq_iter': 1}, or PEFT's LoftQConfig"
        return default, [f"loftq_config={describe(config)}: expected {expected}"]
    settings = LoftQSettings(**given)
    problems = [f"loftq_config: {problem}" for problem in setting_problems(settings)]
    return (default if problems else settings), problems


def loftq_factors(
    weight: Float[Tensor, "d_out d_in"], r: int, scaling: float, settings: LoftQSettings
) -> LoRA:
    """Alternate Q = quantised(W - s B A) with s B A = the best approximation of W - Q of rank r.

    PEFT leaves the scaling s out, so that its sum is off by (s - 1) B A (peft 0.21.2,
    loftq_utils.py:48).
    """
    quantise = QUANTISERS[settings.loftq_bits]
    error = lambda rest: weight - quantise(rest).to(weight.dtype)
    lora = low_rank_factors(error(weight), r, scaling)
    for _ in range(settings.loftq_iter - 1):
        lora = low_rank_factors(error(weight - scaling * lora.b @ lora.a), r, scaling)
    return lora
