"""refusals."""

import math
from collections.abc import Collection
from dataclasses import replace

import regex
import torch

from fastlora.adapters.expert_targets import matched_parameters
from fastlora.adapters.extras import EDGE_MODULES
from fastlora.adapters.init.from_weights import OF_DATA, reads_weights
from fastlora.adapters.patterns import is_target, layer_regex, names_module, pattern_regex
from fastlora.models.config import LlamaConfig
from fastlora.models.names import is_mixture, module_names, projection_weights, target_shape
from fastlora.models.params import DTYPES, PROJECTIONS
from fastlora.models.spec import Extras, LoraConfig
from fastlora.models.state import ModelState
from fastlora.ops.quant.fake_quantize import SCHEMES


def weight_init_problems(s: LoraConfig, extras: Extras, projections: Collection[str]) -> list[str]:
    """Initialisations that read weights: not a head's, and nothing's where there is no other."""
    problems = []
    if not reads_weights(s.init_lora_weights):
        return problems
    given = f"init_lora_weights={s.init_lora_weights!r}"
    if extras.lm_head is not None:
        problems.append(
            f"{given} does not go with target_modules of lm_head; leave the head out, or choose"
            " another."
        )
    if not projections:
        problems.append(f"{given} reads projections' weights, but none is adapted; leave it True.")
    return problems


# ── what cannot be ────────────────────────────────────────────────────────────────────────
def lora_setting_problems(s: LoraConfig) -> list[str]:
    """Values that no model could take, by PEFT's rules."""
    ranks = {"r": s.r} | {f"rank_pattern[{k!r}]": v for k, v in s.rank_pattern}
    alphas = {"lora_alpha": s.lora_alpha} | {f"alpha_pattern[{k!r}]": v for k, v in s.alpha_pattern}
    problems = [
        f"{name}={v!r}: a rank is an integer of at least 1."
        for name, v in ranks.items()
        if type(v) is not int or v < 1
    ]
    problems += [
        f"{name}={v!r}: expected a finite number."
        for name, v in alphas.items()
        if type(v) not in (int, float) or not math.isfinite(v)
    ]
    if type(s.lora_dropout) not in (int, float) or not 0 <= s.lora_dropout <= 1:
        problems.append(f"lora_dropout={s.lora_dropout}: expected a probability in [0, 1).")
    if isinstance(s.target_modules, str) and (s.layers_to_transform or s.layers_pattern):
        problems.append(
            "layers_to_transform, layers_pattern and finetune_last_n_layers only filter a list, but"
            f" target_modules is the string {s.target_modules!r}; list the projections instead."
        )
    if s.layers_pattern and s.layers_to_transform is None:
        problems.append(f"layers_pattern={s.layers_pattern} needs layers_to_transform beside it.")
    return problems


def match_problems(
    s: LoraConfig, config: LlamaConfig, matched: list[str], strict: bool
) -> list[str]:
    problems = _unmatched_problems(s, config, matched) if strict else []
    if not matched and not problems:
        left = f" after exclude_modules={s.exclude_modules!r}" if s.exclude_modules else ""
        only = f" in layers {s.layers_to_transform}" if s.layers_to_transform else ""
        left += f" beside modules_to_save={s.modules_to_save!r}" if s.modules_to_save else ""
        how = "" if isinstance(s.target_modules, tuple) else ", a regex for the whole module name,"
        problems.append(
            f"target_modules={s.target_modules!r}{how} matches no module of this model{left}{only};"
            f" its linear layers are {list(PROJECTIONS)} and lm_head, its embedding embed_tokens."
        )
    return problems


def _beside_parameters(s: LoraConfig, config: LlamaConfig) -> list[str]:
    """Filters that PEFT applies to modules only, where parameters are adapted as well."""
    parameters = matched_parameters(s, config)
    if not parameters:
        return []
    cure = "; name the parameters you want in full, 'model.layers.0.mlp.experts.down_proj', ..."
    problems = []
    if s.layers_to_transform:
        problems.append(
            f"layers_to_transform={s.layers_to_transform} does not filter target_parameters, which"
            f" match {parameters[0]}, ...{cure}"
        )
    exclude = s.exclude_modules or ()
    homes = {p: p.rpartition(".")[0] for p in parameters}
    problems += [
        f"exclude_modules={exclude!r} does not keep target_parameters from {p}{cure}"
        for p in parameters
        if exclude and (names_module(exclude, p) or names_module(exclude, homes[p]))
    ]
    return problems


def _unmatched_problems(s: LoraConfig, config: LlamaConfig, matched: list[str]) -> list[str]:
    """What PEFT ignores: names, layers and patterns that match nothing in this model."""
    modules, n = module_names(config), config.num_hidden_layers

    def idle(rule: tuple[str, ...] | str | None) -> list[str]:
        entries = rule if isinstance(rule, tuple) else [rule] if rule else []
        is_regex = isinstance(rule, str)
        return [
            e for e in entries if not any(names_module(e if is_regex else (e,), m) for m in modules)
        ]

    nothing = "matches no module of this model"
    linear = list(PROJECTIONS)
    problems = []
    if isinstance(s.target_modules, tuple):
        unknown = idle(s.target_modules)
        problems += [f"target_modules: {e!r} {nothing}; expected among {linear}." for e in unknown]
    problems += [
        f"target_parameters: {e!r} matches no parameter of this model."
        for e in s.target_parameters
        if not matched_parameters(replace(s, target_parameters=(e,)), config)
    ]
    problems += [
        f"exclude_modules: {e!r} {nothing}; leave it out." for e in idle(s.exclude_modules)
    ]
    problems += _beside_parameters(s, config)
    problems += [
        f"target_modules: {m} is in no layer; layers_to_transform leaves it out."
        for m in EDGE_MODULES
        if m not in matched and _left_out_by_layers(s, m)
    ]
    beyond = [i for i in s.layers_to_transform or () if i not in range(n)]
    problems += [f"layers_to_transform: {i} is no layer; expected 0 to {n - 1}." for i in beyond]
    for p in s.layers_pattern or ():
        if not any(regex.match(layer_regex(p), m) for m in modules):
            problems.append(f"layers_pattern: {p!r} {nothing}; this model's is 'layers'.")
    for field in ("rank_pattern", "alpha_pattern"):
        for key, _ in getattr(s, field):
            if matched and not any(regex.match(pattern_regex(key), m) for m in matched):
                problems.append(f"{field}: {key!r} matches no module that carries an adapter.")
    return problems


def _left_out_by_layers(s: LoraConfig, module: str) -> bool:
    """Whether a module would be adapted, were it not for layers_to_transform."""
    anywhere = replace(s, layers_to_transform=None, layers_pattern=None)
    return bool(s.layers_to_transform) and is_target(module, anywhere)


_INITS = (True, False, "gaussian", "orthogonal")  # that leave the base alone


# ── what cannot be ────────────────────────────────────────────────────────────────────────
def quantized_base_problems(
    settings: LoraConfig, config: LlamaConfig, loftq: tuple[int, int]
) -> list[str]:
    """What cannot be over a base in 4 or 8 bits."""
    saved = {*settings.extras.replaced} & {*projection_weights(config)}
    problems = [
        f"modules_to_save: {name} is quantised: a copy would begin rounded, and PEFT has none of"
        " such a module; give it LoRA, or load the base in 16 bits."
        for name in sorted(saved)
    ]
    if settings.qat_scheme is not None:
        problems.append(
            f"qat_scheme={settings.qat_scheme!r} over a base that is quantised already; load it in"
            " 16 bits."
        )
    if settings.init_lora_weights == "loftq" and loftq != (4, 1):
        problems.append(
            "loftq_config: more iterations, or other bits, would quantise the base anew; over a"
            " quantised base expected {'loftq_bits': 4, 'loftq_iter': 1}."
        )
    return problems


def init_problems(s: LoraConfig, random_state: int) -> list[str]:
    problems = []
    if s.init_lora_weights in OF_DATA:
        problems.append(
            f"init_lora_weights={s.init_lora_weights!r} needs data: call lora without it, then"
            f" fastlora.initialize(model, batches, {s.init_lora_weights!r})."
        )
    elif not (s.init_lora_weights in _INITS or reads_weights(s.init_lora_weights)):
        known = f"one of {[*_INITS, 'pissa', 'pissa_niter_N', 'olora', 'loftq']}"
        problems.append(f"init_lora_weights={s.init_lora_weights!r}: expected {known}.")
    if s.lora_dropout == 1:
        problems.append("lora_dropout=1 drops every input; expected a probability in [0, 1).")
    if zero := [k for k, v in (("lora_alpha", s.lora_alpha), *s.alpha_pattern) if v == 0]:
        problems.append(f"{zero} are 0, a scaling of 0: such an adapter does nothing.")
    # What torch.Generator takes.
    if type(random_state) is not int or not 0 <= random_state < 2**64:
        problems.append(f"random_state={random_state}: expected an integer in [0, 2**64).")
    return problems


def variant_problems(s: LoraConfig) -> list[str]:
    """Variants, and what they exclude."""
    problems = []
    ranks = [r for r in (s.r, *(v for _, v in s.rank_pattern)) if isinstance(r, int)]
    if s.init_lora_weights == "orthogonal" and (odd := [r for r in ranks if r % 2]):
        problems.append(f"init_lora_weights='orthogonal' needs even ranks, but there are {odd}.")
    if type(s.lora_bias) is not bool:
        problems.append(f"lora_bias={s.lora_bias!r}: expected True or False.")
    if type(s.use_dora) is not bool:
        problems.append(f"use_dora={s.use_dora!r}: expected True or False.")
    if s.lora_bias is True and s.use_dora is True:
        problems.append("lora_bias=True and use_dora=True exclude each other; choose one.")
    if s.lora_bias is True and not isinstance(s.init_lora_weights, bool):
        problems.append(
            f"lora_bias=True needs init_lora_weights True or False, not {s.init_lora_weights!r}."
        )
    return problems


def qat_problems(s: LoraConfig, config: LlamaConfig) -> list[str]:
    """A scheme that is none, what it excludes, and widths that its groups do not divide."""
    if s.qat_scheme is None:
        return []
    if not isinstance(s.qat_scheme, str) or s.qat_scheme not in SCHEMES:
        return [f"qat_scheme={s.qat_scheme!r}: expected one of {list(SCHEMES)}, or None."]
    problems, group = [], SCHEMES[s.qat_scheme].weight.group_size
    if s.lora_dropout:
        problems.append(
            f"lora_dropout={s.lora_dropout} hides inputs from A alone, but qat_scheme quantises"
            " W + scaling * B A as one matrix; leave lora_dropout at 0."
        )
    if reads_weights(s.init_lora_weights):
        problems.append(
            f"init_lora_weights={s.init_lora_weights!r} with qat_scheme: what it subtracts from the"
            " base would have to be quantised with it; choose another of the two."
        )
    if is_mixture(config):
        return [*problems, "qat_scheme: not on mixtures of experts, whose products are grouped."]
    widths = {name: target_shape(config, name)[1] for name in PROJECTIONS}
    widths["lm_head"] = config.hidden_size
    if group and (wrong := {name: d for name, d in widths.items() if d % group}):
        fitting = [name for name, x in SCHEMES.items() if x.weight.group_size is None]
        problems.append(
            f"qat_scheme={s.qat_scheme!r} has groups of {group} inputs, which do not divide the"
            f" widths of {wrong}; schemes without groups are {fitting}."
        )
    return problems


def attach_problems(
    model: ModelState, max_seq_length: int | None, adapter_dtype: str | torch.dtype
) -> list[str]:
    problems, longest = [], model.spec.max_seq_length
    if model.adapter is not None or model.spec.lora is not None:
        problems.append(
            "the model carries an adapter already; call fastlora.merge(model) first to keep it, or"
            " start from the model that fastlora.load returned."
        )
    if max_seq_length is not None and not 1 <= max_seq_length <= longest:
        problems.append(
            f"max_seq_length={max_seq_length}: it can only be lowered here, to 1 to {longest}; a"
            " longer one is asked of fastlora.load."
        )
    if str(adapter_dtype).removeprefix("torch.") not in DTYPES:
        problems.append(f"adapter_dtype={adapter_dtype}: expected one of {list(DTYPES)}.")
    return problems
