"""The values of `init_lora_weights`, by what each needs: nothing, the base's weights, or data."""

import math

import regex

from fastlora.arguments import Rule
from fastlora.models.config import LlamaConfig
from fastlora.models.names import projection_path, projection_shape
from fastlora.models.params import EXPERTS, ROUTER
from fastlora.models.spec import LoraConfig

# lora() computes these. Each of N iterations decomposes every matrix twice; PEFT's examples have 4
# to 16.
_FROM_WEIGHTS = r"pissa|pissa_niter_\d{1,3}|olora|loftq"
DATA_METHODS = ("eva", "corda", "lora_ga")  # fastlora.initialize computes these

# Methods that give A and B sqrt(S / scaling) each.
_NEEDS_POSITIVE_SCALING = r"pissa.*|loftq|corda"


def reads_weights(init: object) -> bool:
    """Whether A and B are computed from the base's weights alone."""
    return isinstance(init, str) and regex.fullmatch(_FROM_WEIGHTS, init) is not None


def moves_base(init: bool | str) -> bool:
    """Whether A0 and B0 are part of W, so that the model has an initial offset."""
    return reads_weights(init) or init in ("corda", "lora_ga")


INIT = Rule(
    lambda x: (
        type(x) is bool
        or (isinstance(x, str) and x in ("gaussian", "orthogonal", *DATA_METHODS))
        or reads_weights(x)
    ),
    "True, False, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_N' with N from 0 to 999, 'olora'"
    " or 'loftq'",
)


def factor_problems(lora: LoraConfig, config: LlamaConfig, init: bool | str) -> list[str]:
    """Problems with projections, ranks and scalings for a method that uses singular vectors."""
    directions_per_rank = 2 if init == "lora_ga" else 1  # LoRA-GA: r for A and r others for B
    needs_positive = regex.fullmatch(_NEEDS_POSITIVE_SCALING, str(init)) is not None
    problems = []
    for i, targets in enumerate(lora.targets):
        for t in targets:
            path = projection_path(i, t.name)
            if t.name in (*EXPERTS, ROUTER):
                problems.append(
                    f"{init!r} does not support {path}: the experts and the router of a mixture"
                    " start at random; leave them out, or choose another init_lora_weights"
                )
                continue
            directions = min(projection_shape(config, t.name))
            if directions_per_rank * t.r > directions:
                problems.append(
                    f"{init!r} cannot give {path} rank {t.r}: its matrix has {directions} singular"
                    f" directions; expected a rank of at most {directions // directions_per_rank}"
                )
            if needs_positive and (t.scaling <= 0 or not math.isfinite(t.scaling)):
                problems.append(
                    f"{init!r} takes the square root of 1 / scaling, but {path} has lora_alpha"
                    f" {t.lora_alpha:g}; expected more than 0"
                )
    return problems
