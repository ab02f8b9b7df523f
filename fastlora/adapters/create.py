"""lora(): attaches a new adapter to a model, and rejects arguments that it cannot honour."""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from fastlora.adapters.init.from_weights import set_initial_factors, weight_factors
from fastlora.adapters.init.loftq import LoftQSettings, loftq_settings
from fastlora.adapters.init.loftq_4bit import fit_quantization_error
from fastlora.adapters.init.methods import reads_weights
from fastlora.adapters.init.random import init_adapter
from fastlora.adapters.lora_arguments import (
    DEFAULT_RECOMPUTE,
    LoraArguments,
    checked_arguments,
    lora_settings,
)
from fastlora.adapters.parked_originals import DEFAULT_PARKING_FOLDER, park_originals
from fastlora.adapters.refusals import conflict_problems, resolved_problems
from fastlora.adapters.targets import resolve_targets
from fastlora.arguments import argument_problems, settings_from
from fastlora.errors import raise_problems
from fastlora.models.input_checks import MODEL
from fastlora.models.params import DTYPES, PROJECTIONS, Adapter, Base, is_quantized
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import Recompute, Spec
from fastlora.models.state import StateT
from fastlora.ops.dispatch import refuse_transforms


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
    temporary_location: str | os.PathLike[str] = DEFAULT_PARKING_FOLDER,
    qat_scheme: str | None = None,
    target_parameters: Collection[str] | None = None,
    ensure_weight_tying: bool = False,
    *,
    recompute: Recompute = DEFAULT_RECOMPUTE,
    use_dora: bool = False,
    lora_bias: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude_modules: Collection[str] | str | None = None,
    finetune_last_n_layers: int | None = None,
    trainable_token_indices: Collection[Any] | Mapping[str, Collection[Any]] | None = None,
    adapter_dtype: str | torch.dtype = "float32",
) -> StateT:
    """Attach a fresh adapter to a model. The given model is unchanged; both share one base.

        base {"layers": ({"q_proj": {"weight": W}, ...}, ...), ...},  adapter None
    ->  base unchanged,  adapter {"layers": ({"q_proj": (A, B), ...}, ...)}

    y = W x + scaling * B A dropout(x), scaling = lora_alpha / r (Hu et al. 2021, arXiv:2106.09685),
    or lora_alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023, arXiv:2312.03732).
    Names and meaning are PEFT's. Settings that PEFT ignores, in silence or with a warning, are an
    error here: for example a name or pattern that matches no module, or a layer that the model does
    not have.

    Args:
        model: without an adapter. The adapter is put on the base's device.
        r: rank of every adapted projection that no `rank_pattern` matches.
        target_modules: a collection of module names or their dotted ends ("q_proj",
            "mlp.down_proj", "model.layers.0.self_attn.q_proj"); or a regular expression for the
            full module name; or "all-linear", which is every linear layer except the head. None is
            PEFT's default, q_proj and v_proj. Phi-3's layers are "qkv_proj", "o_proj",
            "gate_up_proj" and "down_proj", Granite 4's MLP "input_linear" and "output_linear";
            the default seven names mean them all. "embed_tokens" and "lm_head" may be among them;
            if they are tied, each gets its own adapter, unless `ensure_weight_tying`.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability in [0, 1) of dropping an input of A, when a seed is given.
        bias: "all" trains a copy of every bias of the model, "lora_only" of the biases of the
            adapted layers, "none" of none.
        layers_to_transform: indices of the only layers to adapt; empty means all layers. As in
            PEFT, it does not filter a module listed by its full name. It is refused beside
            `target_parameters`, because it would not filter them either.
        layers_pattern: names of the module list that the indices count ("layers").
        use_gradient_checkpointing: old name of `recompute`: False is "none", True is "full",
            "unsloth" is "selective".
        random_state: seeds a private generator, drawn on the CPU: same weights on every device.
        max_seq_length: tokens; lowers the model's limit.
        use_rslora: divide by sqrt(r) instead of r.
        modules_to_save: ends of names of modules that are trained in full, as copies in the base's
            dtype: "embed_tokens", "lm_head", "norm" (every norm of the model, because all their
            names end in "norm"), "model.norm" (the last norm), single linear layers.
        init_lora_weights: True: A uniform in ±1/sqrt(d_in), B zero. "gaussian": A normal with
            standard deviation 1/r, B zero. "orthogonal": B A = 0 with neither zero, r even.
            False: B uniform in ±1/sqrt(r) as well, for tests. "pissa", "pissa_niter_N", "olora",
            "loftq": A and B are computed from the base's weights (init/from_weights.py). PEFT
            subtracts them from the base; here they are kept beside it (models/init_offset.py). The
            model starts equal to its base up to rounding, and is saved as an adapter of twice the
            rank over the unchanged base. "eva", "corda", "lora_ga" need data: use
            fastlora.initialize.
        loftq_config: with "loftq": {"loftq_bits": 4 | 8, "loftq_iter": n} or PEFT's LoftQConfig.
            None or {} means 4 bits (NF4, needs bitsandbytes) and 1 iteration; 8 bits means int8
            with one scale per row.
        temporary_location: folder for the frozen originals of embedding and head if copies of them
            are trained on an accelerator. The originals are then mapped from a file there
            (parked_originals.py); `merge` and `disable` bring them back. The file is removed with
            the last model that uses it. The folder is created if it does not exist.
        qat_scheme: train for quantisation: "int4", "int8", "fp8-int4", "fp8-fp8" or "int8-int4"
            (ops/quant/fake_quantize.py defines them). Every linear layer, adapted or not, and the
            head compute what torchao's quantised layers would compute after merging. Excludes
            lora_dropout, mixtures of experts and initialisations from weights or data.
        target_parameters: names, or their dotted ends, of parameters to adapt: "down_proj" or
            "mlp.experts.down_proj" of a mixture's experts, each of which gets its own A and B, and
            "mlp.gate.weight" of its router; never a regex. Not with dropout, DoRA or lora_bias. On
            a mixture of experts, transformers 4's names of the experts' matrices in
            `target_modules` (gate_proj, up_proj, down_proj; w1, w3, w2), or of the router ("gate"),
            mean these parameters, with gate and up together at twice the rank and alpha.
            "all-linear" means all of them. The default seven names leave Mixtral's experts out,
            because these have other names.
        ensure_weight_tying: train one copy, or one adapter, for both of a tied embedding and head.
            If False, training one of the two does not change the other.
        recompute: how much the backward pass computes again: "none", "selective", "full",
            "offload", or the fraction in [0, 1] of the activation memory of "none" to keep. Left
            out, it is the model's policy: "selective", or what `with_spec` has set. Only "none" and
            1 allow two backward passes of torch.autograd through one forward pass.
        use_dora: train the length of each row of W + scaling * B A as well (Liu et al. 2024,
            arXiv:2402.09353).
        lora_bias: B gets a bias, scaled with it; needs init_lora_weights True or False.
        rank_pattern: regular expression for the end of a module name -> its rank; the first match
            in the order given wins.
        alpha_pattern: the same for lora_alpha, independent of `rank_pattern`.
        exclude_modules: modules never to adapt, in the forms of `target_modules`.
        finetune_last_n_layers: short form of the last n indices of `layers_to_transform`.
        trainable_token_indices: ids whose rows of the embedding are trained, and no others; a tied
            head uses these rows too. {"embed_tokens": ids, "lm_head": ids} names the rows of each.
        adapter_dtype: of A and B; float32 over a bfloat16 base is the usual mixed precision.

    Raises:
        ValueError: listing every argument that is wrong, alone or beside others.
        FileNotFoundError: "loftq" over a quantised base whose checkpoint is not available.
        OSError: writing to `temporary_location` failed.
    """
    refuse_transforms("fastlora.lora")
    heading = "fastlora.lora cannot do this:"
    arguments, problems = checked_arguments(settings_from(LoraArguments, locals()))
    # Without a model nothing else can be checked.
    if wrong_model := argument_problems({"model": (model, MODEL)}):
        raise_problems(ValueError, heading, wrong_model + problems)
    settings = lora_settings(arguments, model.spec.config)
    loftq, loftq_problems = loftq_settings(loftq_config, arguments.init_lora_weights)
    problems += loftq_problems + conflict_problems(arguments, settings, model)
    # Raises all problems found so far, together with its own.
    settings = resolve_targets(settings, model.spec.config, heading, problems)
    # These checks need the resolved targets, so they cannot be in the list above.
    problems = resolved_problems(model, settings, loftq, temporary_location)
    raise_problems(ValueError, heading, problems)

    policy = arguments.recompute_policy  # None: neither name of it was given
    spec = replace(
        model.spec,
        lora=settings,
        recompute=model.spec.recompute if policy is None else policy,
        max_seq_length=max_seq_length or model.spec.max_seq_length,
    )
    dtype = DTYPES[str(adapter_dtype).removeprefix("torch.")]
    base = self_contained(model).base
    adapter = init_adapter(spec, base, dtype, random_state)
    spec, base, adapter = _with_factors_of_weights(spec, base, adapter, loftq, random_state)
    # Last, because the trained copies above are clones of the originals on the device.
    base = park_originals(base, spec.extras, temporary_location)
    return replace(model, spec=spec, base=base, adapter=adapter)


def _with_factors_of_weights(
    spec: Spec, base: Base, adapter: Adapter, loftq: LoftQSettings, random_state: int
) -> tuple[Spec, Base, Adapter]:
    """The same with A and B computed from the base, if `init_lora_weights` asks for it."""
    init = True if spec.lora is None else spec.lora.init_lora_weights
    if not reads_weights(init):
        return spec, base, adapter
    # W - Q is fitted by an ordinary adapter: the model moves closer to the unquantised one.
    if init == "loftq" and is_quantized(base):
        spec, adapter = fit_quantization_error(spec, base, adapter)
        return spec, base, adapter
    generator = torch.Generator().manual_seed(random_state)
    factors = weight_factors(spec, base, generator, loftq)
    return spec, *set_initial_factors(base, adapter, factors)
