"""lora(): which projections carry an adapter, at which rank and scale, and its first weights.

Matching is PEFT's, rule for rule (peft 0.21.2, tuners_utils.py:2337-2412 and utils/other.py:1524),
over the module names that transformers gives these models. It is settled here once: `lora` and the
reader of PEFT folders (export.py) both end in `resolve_targets`, and nothing later sees a pattern.
"""

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

import regex
import torch

from fastlora.checks import raise_problems
from fastlora.expert_keys import former_names, is_mixture, matched_parameters, translate_targets
from fastlora.factors import (
    OF_DATA,
    factor_problems,
    factors,
    loftq_settings,
    reads_weights,
)
from fastlora.llama.config import LlamaConfig
from fastlora.llama.params import (
    EXPERTS,
    PROJECTIONS,
    Adapter,
    AdapterRecord,
    Base,
    BiasedLoRA,
    DoRA,
    ExpertLoRA,
    LoRA,
    base_tensors,
    is_quantized,
    layer_targets,
    projection_path,
    projection_weights,
    target_shape,
)
from fastlora.llama.spec import (
    POLICIES,
    LoraConfig,
    Outside,
    Recompute,
    Spec,
    Target,
    is_recompute,
)
from fastlora.llama.start import with_start
from fastlora.loftq import filled_with_loss
from fastlora.ops.dequantize import dense
from fastlora.ops.dora import row_norms
from fastlora.ops.fake_quantize import SCHEMES
from fastlora.originals import location_problems, offload_originals, with_originals
from fastlora.outside import (
    ENDS,
    first_tensors,
    keeps_lora_away,
    resolve_outside,
    token_indices,
    type_problems,
)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_CHECKPOINTING: dict[bool | str, Recompute] = {False: "none", True: "full", "unsloth": "selective"}
PEFT_TARGETS = ("q_proj", "v_proj")  # PEFT's own choice for Llama, Mistral and Qwen
# To match all patterns with all names, before they are used: patterns of a file are anybody's, and
# `re`, which has no time limit, takes 2**40 steps for "([a-z.]+)+!" on a name of 40 characters.
# The regex library has one.
_SECONDS = 0.5
_INITS = (True, False, "gaussian", "orthogonal")  # that leave the base alone
_TEMPORARY = "_fastlora_temporary_saved_buffers"


@runtime_checkable
class Adaptable(Protocol):
    """What `lora` and `load_adapter` need of a model: a frozen dataclass with these fields."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def spec(self) -> Spec: ...

    @property
    def base(self) -> Base: ...

    @property
    def adapter(self) -> Adapter | None: ...


ModelT = TypeVar("ModelT", bound=Adaptable)


def lora(
    model: ModelT,
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
    temporary_location: str | os.PathLike[str] = _TEMPORARY,
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
) -> ModelT:
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
    problems = layer_problems + policy_problems + _init_problems(settings, random_state)
    if isinstance(target_parameters, str):
        problems.append(f"target_parameters={target_parameters!r}: expected a list of names.")
    loftq, loftq_problems = loftq_settings(loftq_config, init_lora_weights)
    problems += _variant_problems(settings) + loftq_problems + _qat_problems(settings, config)
    problems += _model_problems(model, max_seq_length, adapter_dtype)
    if not isinstance(temporary_location, str | os.PathLike) or not os.fspath(temporary_location):
        problems.append(
            f"temporary_location={temporary_location!r}: expected the path of a folder."
        )
    settings = resolve_targets(settings, config, heading, problems)
    wrong = location_problems(model.base, settings.outside, temporary_location)
    if is_quantized(model.base):
        wrong += _quantized_problems(settings, config, loftq)
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
    base = with_originals(model.base)
    adapter = init_adapter(spec, base, dtype, random_state)
    if init_lora_weights == "loftq" and is_quantized(base):
        spec, adapter = filled_with_loss(spec, base, adapter)
    elif reads_weights(init_lora_weights):
        generator = torch.Generator().manual_seed(random_state)
        found = weight_factors(spec, base, generator, loftq)
        base, adapter = started(base, adapter, found)
    base = offload_originals(base, spec.outside, temporary_location)
    return cast(ModelT, replace(cast(Any, model), spec=spec, base=base, adapter=adapter))


def init_adapter(spec: Spec, base: Base, dtype: torch.dtype, random_state: int) -> Adapter:
    """Fresh weights for every target of `spec.lora`, drawn in float32 on the CPU, layer by layer.

    B is zero, so the model starts equal to its base, unless `init_lora_weights` is False. A DoRA
    magnitude is the norm of what it scales, at least float32, so it changes nothing at first. The
    bounds are kaiming_uniform_'s with a = sqrt(5): 1 / sqrt(fan_in) (peft 0.21.2, layer.py:332).
    """
    assert spec.lora is not None, spec
    config, init = spec.lora, spec.lora.init_lora_weights
    generator, device = torch.Generator().manual_seed(random_state), base["norm"].device

    def fresh(layer: int | None, target: Target) -> AdapterRecord:
        d_out, d_in = target_shape(spec.config, target.name)
        if target.name in EXPERTS:
            n = spec.config.num_local_experts
            pairs = [_first_weights(init, target.r, d_in, d_out, generator, n) for _ in range(n)]
            return ExpertLoRA(*(torch.stack(m).to(device, dtype) for m in zip(*pairs, strict=True)))
        if target.name == "embed_tokens":
            a, b = _first_rows(init, target.r, d_in, d_out, generator)
        else:
            a, b = _first_weights(init, target.r, d_in, d_out, generator)
        a, b = a.to(device, dtype), b.to(device, dtype)
        if config.lora_bias:
            bias = torch.zeros(d_out) if init else _uniform((d_out,), target.r, generator)
            return BiasedLoRA(a, b, bias.to(device, dtype))
        if config.use_dora:
            weight = _matrix(base, layer, target.name)
            wide = torch.promote_types(dtype, torch.float32)
            return DoRA(a, b, row_norms(weight, a, b, target.scaling).to(wide))
        return LoRA(a, b)

    layers = tuple({t.name: fresh(i, t) for t in ts} for i, ts in enumerate(config.targets))
    ends = {t.name: t for t in (spec.outside.embed_tokens, spec.outside.lm_head) if t}
    if spec.outside.tied:
        ends.pop("lm_head", None)
    rest: Any = {name: fresh(None, t) for name, t in ends.items()}
    return Adapter(layers=layers, **rest, **first_tensors(spec.config, spec.outside, base, dtype))


def _matrix(base: Base, layer: int | None, name: str) -> torch.Tensor:
    """What a target adapts, as [d_out, d_in]; an embedding maps one-hot tokens to hidden states."""
    if layer is not None:
        return dense(base["layers"][layer][name]["weight"], base["norm"].dtype)
    if name == "embed_tokens":
        return base["embed_tokens"].t()
    return base["lm_head"] if "lm_head" in base else base["embed_tokens"]


def _first_rows(
    init: bool | str, r: int, d_in: int, d_out: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of an embedding: B normal, A zero unless `init` is False (peft 0.21.2, layer.py:352).

    "pissa", "loftq" and the like are about products with a dense input, and mean True here.
    """
    shape = (r, d_in)
    a = torch.zeros(shape) if init else torch.randn(shape, generator=generator)
    return a, torch.randn(d_out, r, generator=generator)


def weight_factors(
    spec: Spec, base: Base, generator: torch.Generator, loftq: tuple[int, int]
) -> list[dict[str, LoRA]]:
    """A0 and B0 of every target, read off the base's weights as `init_lora_weights` says."""
    assert spec.lora is not None, spec
    init = str(spec.lora.init_lora_weights)

    def found(layer: int, t: Target) -> LoRA:
        weight = _matrix(base, layer, t.name)
        return factors(weight, init, t.r, t.scaling, generator, loftq)

    return [{t.name: found(i, t) for t in ts} for i, ts in enumerate(spec.lora.targets)]


def _quantized_problems(
    settings: LoraConfig, config: LlamaConfig, loftq: tuple[int, int]
) -> list[str]:
    """What cannot be over a base in 4 or 8 bits."""
    saved = {*settings.outside.replaced} & {*projection_weights(config)}
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


def started(
    base: Base, adapter: Adapter, found: Sequence[Mapping[str, LoRA]]
) -> tuple[Base, Adapter]:
    """(base with these start factors, adapter that begins as them), in the adapter's dtype.

    The two share no memory: an optimiser may write to the adapter's. All else of a record, a DoRA
    magnitude, stays: it is that of W, which the sum still is.
    """
    layers = tuple(
        {
            name: record._replace(a=found[i][name].a.to(record.a), b=found[i][name].b.to(record.b))
            for name, record in records.items()
        }
        for i, records in enumerate(adapter["layers"])
    )
    kept = [{n: LoRA(x.a.clone(), x.b.clone()) for n, x in records.items()} for records in layers]
    return with_start(base, kept), Adapter(**adapter | {"layers": layers})


def _first_weights(
    init: bool | str, r: int, d_in: int, d_out: int, generator: torch.Generator, experts: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B); PEFT's B of several experts is one matrix, whose fan-in is all their ranks."""
    if init == "orthogonal":
        return orthogonal_pair(r, d_in, d_out, generator)
    if init == "gaussian":
        a = torch.randn(r, d_in, generator=generator) / r
    else:
        a = _uniform((r, d_in), d_in, generator)
    return a, torch.zeros(d_out, r) if init else _uniform((d_out, r), r * experts, generator)


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(*shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)


def orthogonal_pair(
    r: int, d_in: int, d_out: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with B A = 0 and neither zero: they span orthogonal halves of the rank's space.

    The recipe of peft 0.21.2 (layer.py:603): rows of one random orthogonal [r, r] matrix, the even
    ones for A, the odd ones for B, times normal matrices, over 10.
    """
    q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator))
    a = (torch.randn(d_in, r // 2, generator=generator) @ q[0::2]).T / 10
    b = torch.randn(d_out, r // 2, generator=generator) @ q[1::2] / 10
    return a.contiguous(), b


# ── which modules match ───────────────────────────────────────────────────────────────────


def resolve_targets(
    settings: LoraConfig,
    config: LlamaConfig,
    heading: str,
    problems: Iterable[str] = (),
    *,
    error: type[ValueError] = ValueError,
    strict: bool = True,
) -> LoraConfig:
    """The settings with `targets` filled in: PEFT's modules, ranks and scalings.

    Args:
        settings: as given; the `targets` in it are not read.
        config: the model's shape.
        heading: first line of the error.
        problems: what the caller found already, to be raised together with what is found here.
        error: what to raise.
        strict: also refuse what PEFT would ignore, with or without a warning.

    Raises:
        ValueError: (or `error`) if a value cannot be, a matched module is neither a linear layer
            nor the embedding, or none matches.
    """
    problems = [*problems, *_setting_problems(settings)]
    given, bad_patterns = settings, _regex_problems(settings, config)
    modules, matched, parameters = module_names(config), [], []
    if not bad_patterns:
        is_target = lambda name: _is_target(name, given)
        settings, untranslated = translate_targets(given, config, modules, is_target)
        problems += untranslated
        matched = [m for m in modules if _is_target(m, settings)]
        parameters = matched_parameters(settings, config)
    found, parameter_problems = _adapted(settings, config, matched, parameters)
    problems += [
        f"target_modules matches {m}, which is no linear layer; expected among {list(PROJECTIONS)}."
        for m in matched
        if m.rpartition(".")[2] not in PROJECTIONS and m not in ENDS
    ]
    problems += parameter_problems
    problems += bad_patterns or _match_problems(settings, config, [*matched, *parameters], strict)
    outside = Outside()
    if not (bad_patterns or problems):  # whose ranks and patterns can be used
        of = partial(_target, settings)
        outside, problems = resolve_outside(settings, config, modules, matched, of, strict)
        problems += _start_problems(settings, outside, found)
    raise_problems(error, heading, problems)
    targets = tuple(
        tuple(
            _target(settings, name, found[path])
            for name in layer_targets(config, layer)
            if (path := projection_path(layer, name)) in found
        )
        for layer in range(config.num_hidden_layers)
    )
    return replace(given, targets=targets, outside=outside)


def _start_problems(s: LoraConfig, outside: Outside, projections: Collection[str]) -> list[str]:
    """Initialisations that read weights: not a head's, and nothing's where there is no other."""
    problems = []
    if not reads_weights(s.init_lora_weights):
        return problems
    given = f"init_lora_weights={s.init_lora_weights!r}"
    if outside.lm_head is not None:
        problems.append(
            f"{given} does not go with target_modules of lm_head; leave the head out, or choose"
            " another."
        )
    if not projections:
        problems.append(f"{given} reads projections' weights, but none is adapted; leave it True.")
    return problems


def _adapted(
    s: LoraConfig, config: LlamaConfig, modules: list[str], parameters: list[str]
) -> tuple[dict[str, str], list[str]]:
    """(projection_path -> the name that patterns are matched with, problems)."""
    found = {m: m for m in modules if m.rpartition(".")[2] in PROJECTIONS}
    paths = {
        p if n in EXPERTS else f"{p}.weight": p
        for layer in range(config.num_hidden_layers)
        for n in layer_targets(config, layer)
        for p in [projection_path(layer, n)]
    }
    problems = [
        f"target_parameters matches {p}, which is neither a projection's weight nor experts'; embed"
        "ding and head are targets of target_modules."
        for p in parameters
        if p not in paths
    ]
    problems += [
        f"target_parameters matches {p}, whose module target_modules matches too; leave it to one."
        for p in parameters
        if paths.get(p) in found
    ]
    wrong = {"lora_dropout": s.lora_dropout, "use_dora": s.use_dora, "lora_bias": s.lora_bias}
    problems += [
        f"{name}={value!r} does not go with target_parameters ({parameters[0]}, ...): a parameter"
        " has no input of its own; leave it at its default, or leave the parameters out."
        for name, value in wrong.items()
        if parameters and value
    ]
    return found | {paths[p]: p for p in parameters if p in paths}, problems


def with_targets(lora: LoraConfig, targets: tuple[tuple[Target, ...], ...]) -> LoraConfig:
    """The settings with these targets, chosen one by one, spelled so that they resolve to them.

    By full names, so that no two patterns match the same module and their order is no matter.
    """
    named = {projection_path(i, t.name): t for i, ts in enumerate(targets) for t in ts}
    ends = {module: getattr(lora.outside, end) for module, end in ENDS.items()}
    named |= {module: t for module, t in ends.items() if t is not None}
    ranks = {path: t.r for path, t in named.items() if t.r != lora.r}
    alphas = {path: t.lora_alpha for path, t in named.items() if t.lora_alpha != lora.lora_alpha}
    return replace(
        lora,
        target_modules=tuple(named),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=tuple((regex.escape(path), r) for path, r in ranks.items()),
        alpha_pattern=tuple((regex.escape(path), alpha) for path, alpha in alphas.items()),
        targets=targets,
    )


def peft_targets(config: LlamaConfig) -> tuple[str, ...]:
    """What PEFT adapts where it is told nothing; of a mixture of experts, nothing."""
    return () if is_mixture(config) else PEFT_TARGETS


def _target(settings: LoraConfig, name: str, path: str) -> Target:
    r = _first_match(settings.rank_pattern, path, settings.r)
    alpha = _first_match(settings.alpha_pattern, path, settings.lora_alpha)
    scaling = alpha / (math.sqrt(r) if settings.use_rslora else r)
    return Target(name=name, r=r, lora_alpha=alpha, scaling=scaling)


def _first_match(patterns: tuple[tuple[str, Any], ...], path: str, default: Any) -> Any:
    return next((v for key, v in patterns if regex.match(_pattern_regex(key), path)), default)


def _is_target(module: str, settings: LoraConfig) -> bool:
    targets = settings.target_modules
    if settings.exclude_modules and _names(settings.exclude_modules, module):
        return False
    if keeps_lora_away(settings.modules_to_save, module):
        return False
    if targets == "all-linear":
        return module.rpartition(".")[2] in PROJECTIONS
    if isinstance(targets, tuple) and module in targets:
        return True  # before the layers are asked: PEFT does not filter a full name by its layer
    return _names(targets, module) and _in_layers(module, settings)


def _names(rule: tuple[str, ...] | str, module: str) -> bool:
    """A string is a regular expression for the whole name, a tuple holds names or dotted ends."""
    if isinstance(rule, str):
        return regex.fullmatch(rule, module) is not None
    return any(f".{module}".endswith(f".{end}") for end in rule)


def _in_layers(module: str, settings: LoraConfig) -> bool:
    """Whether the first number after a `layers_pattern` is among `layers_to_transform`."""
    if not settings.layers_to_transform:
        return True
    patterns = settings.layers_pattern or (r"[^.]*",)
    found = (regex.match(_layer_regex(p), module) for p in patterns)
    first = next((m for m in found if m), None)
    return first is not None and int(first["idx"]) in settings.layers_to_transform


def _pattern_regex(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def module_names(config: LlamaConfig) -> list[str]:
    """Every module that transformers' model of this shape has: what patterns are matched with."""
    attention = ["q_norm", "k_norm"] if config.qk_norm else []
    inner = ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
    inner += [f"self_attn.{n}" for n in attention]
    mlps = {False: ["mlp.act_fn"], True: ["mlp.gate", "mlp.experts", "mlp.experts.act_fn"]}
    names = ["model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"]
    for layer in range(config.num_hidden_layers):
        own = [*inner, *mlps[config.sparse_layers[layer]]]
        names += [f"model.layers.{layer}", *(f"model.layers.{layer}.{n}" for n in own)]
        names += [
            projection_path(layer, n) for n in layer_targets(config, layer) if n in PROJECTIONS
        ]
    return [*names, "lm_head"]


# ── what cannot be ────────────────────────────────────────────────────────────────────────


def as_tuple(value: Collection[Any] | str | int | None) -> tuple[Any, ...] | None:
    """A collection as a tuple, a set in sorted order, and one name or number as a tuple of one."""
    if value is None:
        return None
    if isinstance(value, str | int):
        return (value,)
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


def names_or_regex(value: Collection[str] | str) -> tuple[str, ...] | str:
    """A collection as a tuple; a string as it is, with "all-linear" in lower case."""
    if isinstance(value, str):
        return value.lower() if value.lower() == "all-linear" else value
    return as_tuple(value) or ()


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


def _init_problems(s: LoraConfig, random_state: int) -> list[str]:
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


def _variant_problems(s: LoraConfig) -> list[str]:
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


def _qat_problems(s: LoraConfig, config: LlamaConfig) -> list[str]:
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


def _model_problems(
    model: Adaptable, max_seq_length: int | None, adapter_dtype: str | torch.dtype
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


def _setting_problems(s: LoraConfig) -> list[str]:
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


def _regex_problems(s: LoraConfig, config: LlamaConfig) -> list[str]:
    """Patterns that are none, or that could not be matched with this model's names in time."""
    if wrong := [p for p in s.layers_pattern or () if regex.search(r"[|(){}?#]", p)]:
        return [f"layers_pattern={wrong!r:.200}: expected names of module lists."]
    patterns = [("rank_pattern", k, _pattern_regex(k)) for k, _ in s.rank_pattern]
    patterns += [("alpha_pattern", k, _pattern_regex(k)) for k, _ in s.alpha_pattern]
    patterns += [("layers_pattern", p, _layer_regex(p)) for p in s.layers_pattern or ()]
    for field in ("target_modules", "exclude_modules"):
        if isinstance(rule := getattr(s, field), str):
            patterns.append((field, rule, rule))
    names, end = module_names(config), perf_counter() + _SECONDS
    if is_mixture(config) or s.target_parameters:
        names += [*base_tensors(config), *former_names(config)]
    problems = []
    for field, pattern, x in patterns:
        # A full name, of which there may be 882 (Llama 3.1 405B), repeats nothing.
        repeats = regex.search(r"[*+?{(]", pattern) is not None
        if why := _refusal(x, names if repeats else (), end):
            problems.append(f"{field}: {pattern!r:.200} {why}.")
    return problems


def _refusal(pattern: str, names: Iterable[str], end: float) -> str:
    try:
        compiled = regex.compile(pattern)
        for name in names:
            compiled.fullmatch(name, timeout=max(end - perf_counter(), 1e-3))
    except TimeoutError:
        return "takes too long to match; list names instead"
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        return f"is no regular expression: {error}"
    return ""


def _match_problems(
    s: LoraConfig, config: LlamaConfig, matched: list[str], strict: bool
) -> list[str]:
    problems = _without_effect(s, config, matched) if strict else []
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
        if exclude and (_names(exclude, p) or _names(exclude, homes[p]))
    ]
    return problems


def _without_effect(s: LoraConfig, config: LlamaConfig, matched: list[str]) -> list[str]:
    """What PEFT ignores: names, layers and patterns that match nothing in this model."""
    modules, n = module_names(config), config.num_hidden_layers

    def idle(rule: tuple[str, ...] | str | None) -> list[str]:
        entries = rule if isinstance(rule, tuple) else [rule] if rule else []
        is_regex = isinstance(rule, str)
        return [e for e in entries if not any(_names(e if is_regex else (e,), m) for m in modules)]

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
        for m in ENDS
        if m not in matched and _left_out_by_layers(s, m)
    ]
    beyond = [i for i in s.layers_to_transform or () if i not in range(n)]
    problems += [f"layers_to_transform: {i} is no layer; expected 0 to {n - 1}." for i in beyond]
    for p in s.layers_pattern or ():
        if not any(regex.match(_layer_regex(p), m) for m in modules):
            problems.append(f"layers_pattern: {p!r} {nothing}; this model's is 'layers'.")
    for field in ("rank_pattern", "alpha_pattern"):
        for key, _ in getattr(s, field):
            if matched and not any(regex.match(_pattern_regex(key), m) for m in matched):
                problems.append(f"{field}: {key!r} matches no module that carries an adapter.")
    return problems


def _left_out_by_layers(s: LoraConfig, module: str) -> bool:
    """Whether a module would be adapted, were it not for layers_to_transform."""
    anywhere = replace(s, layers_to_transform=None, layers_pattern=None)
    return bool(s.layers_to_transform) and _is_target(module, anywhere)
