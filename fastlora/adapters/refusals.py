"""Combinations of arguments, model and machine that lora() refuses.

lora_arguments.py checks each argument alone; unmatched.py checks names and patterns.
"""

import os
from collections.abc import Collection

from fastlora.adapters.init.loftq import LoftQSettings
from fastlora.adapters.init.methods import DATA_METHODS, factor_problems, reads_weights
from fastlora.adapters.lora_arguments import DEFAULT_RECOMPUTE, LoraArguments
from fastlora.adapters.parked_originals import location_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.names import is_mixture, linear_names, projection_weights, target_shape
from fastlora.models.params import is_quantized
from fastlora.models.spec import Extras, LoraConfig
from fastlora.models.state import ModelState
from fastlora.ops.quant.fake_quantize import SCHEMES
from fastlora.runtime.layer_fetching import is_sharded


def conflict_problems(arguments: LoraArguments, s: LoraConfig, model: ModelState) -> list[str]:
    """Problems that do not depend on the modules that the settings match.

    Args:
        arguments: each keeps its rule.
        s: the same choices as settings.
        model: the model to attach an adapter to.
    """
    problems = _model_problems(arguments, model) + _duplicate_problems(arguments, model.spec.config)
    return problems + _init_problems(s) + _variant_problems(s) + _qat_problems(s, model.spec.config)


def resolved_problems(
    model: ModelState, s: LoraConfig, loftq: LoftQSettings, folder: str | os.PathLike[str]
) -> list[str]:
    """Problems of resolved settings with the base, and of `temporary_location`."""
    problems = location_problems(model.base, s.extras, folder)
    if is_sharded(model.base):
        problems += _sharded_base_problems(s)
    if is_quantized(model.base):
        problems += _quantized_base_problems(s, model.spec.config, loftq)
    if reads_weights(s.init_lora_weights):
        problems += factor_problems(s, model.spec.config, s.init_lora_weights)
    return problems


def _model_problems(arguments: LoraArguments, model: ModelState) -> list[str]:
    problems, longest = [], model.spec.max_seq_length
    if model.adapter is not None or model.spec.lora is not None:
        problems.append(
            "model already has an adapter; call fastlora.merge(model) first to keep it, or start"
            " from the model that fastlora.load returned"
        )
    if arguments.max_seq_length is not None and arguments.max_seq_length > longest:
        problems.append(
            f"max_seq_length={arguments.max_seq_length}: lora can only lower it, to 1 to {longest};"
            " pass a longer one to fastlora.load"
        )
    return problems


def _duplicate_problems(arguments: LoraArguments, config: LlamaConfig) -> list[str]:
    """Two arguments for one setting, and more last layers than there are."""
    problems, checkpointing = [], arguments.use_gradient_checkpointing
    if checkpointing is not None and arguments.recompute is not DEFAULT_RECOMPUTE:
        problems.append(
            f"recompute={arguments.recompute!r}, use_gradient_checkpointing={checkpointing!r}: two"
            " names of one setting; give recompute only"
        )
    last, n = arguments.finetune_last_n_layers, config.num_hidden_layers
    if last is not None and arguments.layers_to_transform is not None:
        problems.append(
            "finetune_last_n_layers and layers_to_transform are two forms of one setting; give one"
        )
    if last is not None and last > n:
        problems.append(f"finetune_last_n_layers={last}: this model has {n} layers")
    return problems


def _init_problems(s: LoraConfig) -> list[str]:
    """First values or scalings with which no adapter trains."""
    problems = []
    if s.init_lora_weights in DATA_METHODS:
        problems.append(
            f"init_lora_weights={s.init_lora_weights!r} needs data: call lora without it, then"
            f" fastlora.initialize(model, batches, {s.init_lora_weights!r})"
        )
    if s.lora_dropout == 1:
        problems.append("lora_dropout=1 drops every input; expected a number in [0, 1)")
    # PEFT accepts 0; the gradients of A and B would then be 0 too.
    if zero := [k for k, v in (("lora_alpha", s.lora_alpha), *s.alpha_pattern) if v == 0]:
        problems.append(f"{zero} are 0, which makes the scaling 0: the adapter would do nothing")
    return problems


def _variant_problems(s: LoraConfig) -> list[str]:
    """Settings that lora_bias, use_dora and orthogonal factors exclude."""
    problems = []
    # Pattern values that are not integers are reported by lora_setting_problems.
    ranks = [r for r in (s.r, *(v for _, v in s.rank_pattern)) if isinstance(r, int)]
    if s.init_lora_weights == "orthogonal" and (odd := [r for r in ranks if r % 2]):
        problems.append(f"init_lora_weights='orthogonal' needs even ranks, but there are {odd}")
    if s.lora_bias and s.use_dora:
        problems.append("lora_bias=True and use_dora=True exclude each other; choose one")
    if s.lora_bias and not isinstance(s.init_lora_weights, bool):
        problems.append(
            f"lora_bias=True needs init_lora_weights True or False, not {s.init_lora_weights!r}"
        )
    return problems


def _qat_problems(s: LoraConfig, config: LlamaConfig) -> list[str]:
    """Settings that a qat_scheme excludes, and matrices that it cannot quantise."""
    if s.qat_scheme is None:
        return []
    problems = []
    if s.lora_dropout:
        problems.append(
            f"lora_dropout={s.lora_dropout} hides inputs from A alone, but qat_scheme quantises"
            " W + scaling * B A as one matrix; leave lora_dropout at 0"
        )
    if reads_weights(s.init_lora_weights):
        problems.append(
            f"init_lora_weights={s.init_lora_weights!r} with qat_scheme: the initial offset would"
            " have to be quantised together with the base; choose another value of one of the two"
        )
    wrong = qat_shape_problem(s.qat_scheme, config)
    return problems if wrong is None else [*problems, wrong]


def qat_shape_problem(scheme: str, config: LlamaConfig) -> str | None:
    """Why a model's matrices cannot be quantised by a scheme of `qat_scheme`; None if they can."""
    # The widths below are those of dense layers.
    if is_mixture(config):
        return "qat_scheme does not support the grouped products of mixtures of experts"
    group = SCHEMES[scheme].weight.group_size
    widths = {name: target_shape(config, name)[1] for name in linear_names(config)}
    widths["lm_head"] = config.hidden_size
    if group and (wrong := {name: d for name, d in widths.items() if d % group}):
        without_groups = [name for name, x in SCHEMES.items() if x.weight.group_size is None]
        return (
            f"qat_scheme={scheme!r} has groups of {group} inputs, which do not divide the widths of"
            f" {wrong}; schemes without groups are {without_groups}"
        )
    return None


def _quantized_base_problems(s: LoraConfig, config: LlamaConfig, loftq: LoftQSettings) -> list[str]:
    """Settings that cannot be used over a base in 4 or 8 bits."""
    # Norms, embedding and head are in 16 bits over a quantised base and may be copied.
    copied = {*s.extras.replaced} & {*projection_weights(config)}
    problems = [
        f"modules_to_save: {name} is quantised, so its copy would start rounded, and PEFT does not"
        " copy such modules; give it LoRA, or load the base in 16 bits"
        for name in sorted(copied)
    ]
    if s.qat_scheme is not None:
        problems.append(
            f"qat_scheme={s.qat_scheme!r}: this base is already quantised; load it in 16 bits"
        )
    if s.init_lora_weights == "loftq" and loftq != LoftQSettings():
        problems.append(
            "loftq_config: more iterations, or other bits, would quantise the base again; over a"
            " quantised base expected {'loftq_bits': 4, 'loftq_iter': 1}"
        )
    return problems


def _sharded_base_problems(s: LoraConfig) -> list[str]:
    """Settings that cannot be used over a base that `load(shard=)` has sharded."""
    in_layers = [name for name in s.extras.replaced if name.startswith("model.layers.")]
    problems = [
        f"bias or modules_to_save: {name} is in a sharded layer, of which no copy is trained; train"
        " LoRA there, or load the base with shard=None"
        for name in in_layers[:3]
    ]
    if s.qat_scheme is not None:
        problems.append(
            f"qat_scheme={s.qat_scheme!r} is not supported over a sharded base; load it with"
            " shard=None"
        )
    return problems


def weight_init_problems(s: LoraConfig, extras: Extras, projections: Collection[str]) -> list[str]:
    """Why a method that reads the projections' weights cannot be used with these targets."""
    if not reads_weights(s.init_lora_weights):
        return []
    problems, given = [], f"init_lora_weights={s.init_lora_weights!r}"
    # Only the linear layers of the decoder have a place for an initial offset.
    if extras.lm_head is not None:
        problems.append(
            f"{given} does not go with target_modules of lm_head; leave the head out, or choose"
            " another value"
        )
    if not projections:
        problems.append(
            f"{given} reads projections' weights, but no projection is adapted; leave it True"
        )
    return problems
