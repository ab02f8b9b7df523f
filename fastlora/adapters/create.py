"""lora(): a model with a fresh adapter, and what cannot be."""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from fastlora.adapters.extras import token_indices, type_problems
from fastlora.adapters.init.from_weights import (
    factor_problems,
    loftq_settings,
    reads_weights,
    start_from_factors,
    weight_factors,
)
from fastlora.adapters.init.loftq_4bit import filled_with_loss
from fastlora.adapters.init.random import init_adapter
from fastlora.adapters.parked_originals import location_problems, park_originals
from fastlora.adapters.patterns import as_tuple, names_or_regex
from fastlora.adapters.refusals import (
    attach_problems,
    init_problems,
    qat_problems,
    quantized_base_problems,
    variant_problems,
)
from fastlora.adapters.targets import peft_targets, resolve_targets
from fastlora.errors import raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.params import DTYPES, PROJECTIONS, is_quantized
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import POLICIES, LoraConfig, Recompute, is_recompute
from fastlora.models.state import StateT

_CHECKPOINTING: dict[bool | str, Recompute] = {False: "none", True: "full", "unsloth": "selective"}

_DEFAULT_PARKING_FOLDER = "_fastlora_temporary_saved_buffers"


def lora(
    model: StateT,
    r: int = 16,
    target_modules: Collection[str] | str | None = tuple(PROJECTIONS),
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    bias: str = "none",
    layers_to_transform: Collection[int] | int | None = None,
    layers_pattern: Collection[str] | str | None = None,
    use_gradient_checkpointing: bool | str | None = None,
    random_state: int = 3407,
    max_seq_length: int | None = None,
    use_rslora: bool = False,
    modules_to_save: Collection[str] | None = None,
    init_lora_weights: bool | str = True,
    loftq_config: Any = None,
    temporary_location: str | os.PathLike[str] = _DEFAULT_PARKING_FOLDER,
    qat_scheme: str | None = None,
    target_parameters: Collection[str] | None = None,
    ensure_weight_tying: bool = False,
    *,
    recompute: Recompute = "selective",
    use_dora: bool = False,
    lora_bias: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude_modules: Collection[str] | str | None = None,
    finetune_last_n_layers: int | None = None,
    trainable_token_indices: Collection[Any] | Mapping[str, Collection[Any]] | None = None,
    adapter_dtype: str | torch.dtype = "float32",
) -> StateT:
    """The model with a fresh adapter; the given one is unchanged and shares its base.

    y = W x + scaling * B A dropout(x), scaling = lora_alpha / r (Hu et al. 2021, arXiv:2106.09685),
    or lora_alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023, arXiv:2312.03732).
    Names and meaning are PEFT's, save that what PEFT would ignore in silence, or with a warning, is
    an error here: a name or pattern that matches no module of this model, a layer it lacks.

    Args:
        model: without an adapter; its base may be on any device, the adapter follows it.
        r: rank of every adapted projection that no `rank_pattern` matches.
        target_modules: a collection of module names or their dotted ends ("q_proj",
            "mlp.down_proj", "model.layers.0.self_attn.q_proj"); or a regular expression for the
            whole module name; or "all-linear", which is all but the head. None is PEFT's own
            default, q_proj and v_proj. "embed_tokens" and "lm_head" may be among them; of a tied
            pair each has its own, unless `ensure_weight_tying`.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability in [0, 1) of dropping an input of A, where a seed is given.
        bias: "all" trains a copy of every bias of the model, "lora_only" of those of the adapted
            layers, "none" none.
        layers_to_transform: indices of the only layers to adapt; empty is all of them. Does not
            filter a module listed by its full name, as in PEFT, and is refused beside
            `target_parameters`, which it would not filter either.
        layers_pattern: names of the module list that the indices count ("layers").
        use_gradient_checkpointing: old name of `recompute`: False is "none", True is "full",
            "unsloth" is "selective".
        random_state: seeds a private generator, drawn on the CPU: same weights on every device.
        max_seq_length: tokens; lowers the model's own.
        use_rslora: divide by sqrt(r) in place of r.
        modules_to_save: ends of names of modules of which a copy is trained whole, in the base's
            dtype: "embed_tokens", "lm_head", "norm" (every norm of the model, as the ends of their
            names are "norm" too), "model.norm" (the last one), single linear layers.
        init_lora_weights: True: A uniform in ±1/sqrt(d_in), B zero. "gaussian": A normal with
            standard deviation 1/r, B zero. "orthogonal": B A = 0 with neither zero, r even.
            False: B uniform in ±1/sqrt(r) as well, for tests. "pissa", "pissa_niter_N", "olora",
            "loftq": A and B are a part of the base's weights (factors.py), and what PEFT would
            subtract from these is kept beside them (llama/start.py): the model starts equal to its
            base to rounding, the base's tensors stay as they are, and it is saved as an adapter of
            twice the rank over them. "eva", "corda", "lora_ga" need data: fastlora.initialize.
        loftq_config: with "loftq": {"loftq_bits": 4 | 8, "loftq_iter": n} or PEFT's LoftQConfig;
            None or {} is 4 bits (NF4, needs bitsandbytes) and 1 iteration. 8 bits is an int8 row.
        temporary_location: folder for the frozen originals of embedding and head, where copies are
            trained in their place on an accelerator: they wait there in a memory-mapped file
            (originals.py), come back for `merge` and `disable`, and the file goes with the last
            model that uses it. Made if it is not there.
        qat_scheme: train for quantisation: "int4", "int8", "fp8-int4", "fp8-fp8" or "int8-int4"
            (ops/fake_quantize.py says what they are). Every linear layer, adapted or not, and the
            head run as torchao would have them once merged and quantised. Excludes lora_dropout,
            mixtures of experts and the initialisations that move the base.
        target_parameters: names, or their dotted ends, of parameters to adapt: "down_proj" or
            "mlp.experts.down_proj" of a mixture's experts, each of which gets its own A and B, and
            "mlp.gate.weight" of its router; never a regex. Not with dropout, DoRA or lora_bias. On
            a mixture of experts, `target_modules` naming the experts' matrices as transformers 4
            did (gate_proj, up_proj, down_proj; w1, w3, w2), or the router ("gate"), means these
            parameters, for gate and up together at twice the rank and alpha; "all-linear" means all
            of them, and the default seven names leave Mixtral's experts, named otherwise, alone.
        ensure_weight_tying: of a tied embedding and head, train one copy, or one adapter, for
            both. Without it what is trained of one leaves the other as the base has it.
        recompute: what the backward pass computes again; "none", "selective", "full", "offload",
            or the share in [0, 1] of the activation memory of "none" to keep.
        use_dora: train the length of each row of W + scaling * B A as well (Liu et al. 2024,
            arXiv:2402.09353).
        lora_bias: B gets a bias, scaled with it; needs init_lora_weights True or False.
        rank_pattern: regular expression for the end of a module name -> its rank; the first match
            in the order given wins.
        alpha_pattern: the same for lora_alpha, looked up on its own.
        exclude_modules: modules never to adapt, given as `target_modules` is.
        finetune_last_n_layers: short for the last n indices of `layers_to_transform`.
        trainable_token_indices: ids whose rows of the embedding are trained, and no others; a tied
            head has them too. {"embed_tokens": ids, "lm_head": ids} names the rows of each.
        adapter_dtype: of A and B; float32 over a bfloat16 base is the usual mixed precision.

    Raises:
        ValueError: listing every argument that cannot be.
        OSError: if writing to `temporary_location` fails.
    """
    heading = "fastlora.lora cannot do this:"
    raise_problems(
        ValueError,
        heading,
        type_problems(bias, modules_to_save, ensure_weight_tying, trainable_token_indices),
    )
    config = model.spec.config
    layers, layer_problems = _layers(layers_to_transform, finetune_last_n_layers, config)
    policy, policy_problems = _recompute(recompute, use_gradient_checkpointing)
    settings = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=names_or_regex(
            peft_targets(config) if target_modules is None else target_modules
        ),
        exclude_modules=names_or_regex(exclude_modules) if exclude_modules else None,
        layers_to_transform=layers,
        layers_pattern=as_tuple(layers_pattern),
        use_rslora=use_rslora,
        rank_pattern=tuple((rank_pattern or {}).items()),
        alpha_pattern=tuple((alpha_pattern or {}).items()),
        init_lora_weights=init_lora_weights,
        lora_bias=lora_bias,
        use_dora=use_dora,
        target_parameters=as_tuple(target_parameters) or (),
        qat_scheme=qat_scheme,
        bias=bias,
        modules_to_save=as_tuple(modules_to_save) or (),
        ensure_weight_tying=ensure_weight_tying,
        trainable_token_indices=token_indices(trainable_token_indices),
        targets=(),
    )
    problems = layer_problems + policy_problems + init_problems(settings, random_state)
    if isinstance(target_parameters, str):
        problems.append(f"target_parameters={target_parameters!r}: expected a list of names.")
    loftq, loftq_problems = loftq_settings(loftq_config, init_lora_weights)
    problems += variant_problems(settings) + loftq_problems + qat_problems(settings, config)
    problems += attach_problems(model, max_seq_length, adapter_dtype)
    if not isinstance(temporary_location, str | os.PathLike) or not os.fspath(temporary_location):
        problems.append(
            f"temporary_location={temporary_location!r}: expected the path of a folder."
        )
    settings = resolve_targets(settings, config, heading, problems)
    wrong = location_problems(model.base, settings.extras, temporary_location)
    if is_quantized(model.base):
        wrong += quantized_base_problems(settings, config, loftq)
    raise_problems(ValueError, heading, wrong)
    if reads_weights(init_lora_weights):
        raise_problems(ValueError, heading, factor_problems(settings, config, init_lora_weights))
    spec = replace(
        model.spec,
        lora=settings,
        recompute=policy,
        max_seq_length=max_seq_length or model.spec.max_seq_length,
    )
    dtype = DTYPES[str(adapter_dtype).removeprefix("torch.")]
    base = self_contained(model).base
    adapter = init_adapter(spec, base, dtype, random_state)
    if init_lora_weights == "loftq" and is_quantized(base):
        spec, adapter = filled_with_loss(spec, base, adapter)
    elif reads_weights(init_lora_weights):
        generator = torch.Generator().manual_seed(random_state)
        found = weight_factors(spec, base, generator, loftq)
        base, adapter = start_from_factors(base, adapter, found)
    base = park_originals(base, spec.extras, temporary_location)
    return replace(model, spec=spec, base=base, adapter=adapter)


def _layers(
    layers: Collection[int] | int | None, last_n: int | None, config: LlamaConfig
) -> tuple[tuple[int, ...] | None, list[str]]:
    if last_n is None:
        return as_tuple(layers), []
    n, problems = config.num_hidden_layers, []
    if layers is not None:
        problems.append("finetune_last_n_layers and layers_to_transform say the same; give one.")
    if not 1 <= last_n <= n:
        problems.append(
            f"finetune_last_n_layers={last_n}: expected 1 to {n}, the layers there are."
        )
    return tuple(range(max(n - last_n, 0), n)), problems


def _recompute(policy: Recompute, checkpointing: bool | str | None) -> tuple[Recompute, list[str]]:
    if checkpointing is not None:
        if checkpointing not in _CHECKPOINTING:
            given = f"use_gradient_checkpointing={checkpointing!r}"
            return policy, [f"{given}: expected True, False or 'unsloth'; or use recompute."]
        if policy != "selective":
            given = f"recompute={policy!r}, use_gradient_checkpointing={checkpointing!r}"
            return policy, [f"{given}: two names of one setting; give recompute only."]
        return _CHECKPOINTING[checkpointing], []
    if is_recompute(policy):
        return policy, []
    return policy, [f"recompute={policy!r}: expected one of {POLICIES} or a number in [0, 1]."]
