"""Spec: everything about a model that is not a tensor. Frozen and hashable."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fastlora.errors import raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.ops.dispatch import Kernels, kernels_run, transforms_active
from fastlora.runtime.compiled import Compile, compiles
from fastlora.runtime.devices import device_problem

Recompute = Literal["none", "selective", "full", "offload"] | float

POLICIES = ("none", "selective", "full", "offload")

UNTIED = "tie_word_embeddings"  # in Spec.changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One adapted matrix, with its rank and scaling."""

    name: str  # of params.TARGETS: "q_proj", "gate", "experts.down_proj"
    r: int
    lora_alpha: float
    scaling: float  # the result of `lora_scaling`


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """The factor on B A: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """The tensors that an adapter trains besides LoRA on projections."""

    embed_tokens: Target | None = None  # LoRA on the embedding
    lm_head: Target | None = None  # LoRA on the head
    tied: bool = False  # the head uses the embedding's LoRA (transposed) or trained copy
    replaced: tuple[str, ...] = ()  # names on disk of tensors of which a copy is trained
    # ("embed_tokens" or "lm_head", the ids whose rows are trained, in the order of the rows).
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()
    shared_rows: bool = False  # the head of a tied model uses the embedding's trained rows too


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """LoRA settings under PEFT's names, and the tensors that they resolve to.

    `targets` are the adapted matrices of the layers, `extras` everything outside of them.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str | None
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...] | None
    use_rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]  # in the order given: the first match wins
    alpha_pattern: tuple[tuple[str, float], ...]
    init_lora_weights: bool | str
    lora_bias: bool = False  # B has a bias
    use_dora: bool = False
    target_parameters: tuple[str, ...] = ()
    qat_scheme: str | None = None  # a key of ops.quant.fake_quantize.SCHEMES
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    trainable_token_indices: tuple[Any, ...] = ()  # ids of the embedding, or (module, ids) pairs
    extras: Extras = Extras()
    targets: tuple[tuple[Target, ...], ...]  # one tuple per layer, in params.TARGETS order


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How to run a model: its shape, its adapter's settings, and the choices of `with_spec`."""

    config: LlamaConfig
    name_or_path: str  # what load() was given; saved as base_model_name_or_path
    revision: str | None = None  # of the base on the Hub, as load() was given it
    base_folder: str | None = None  # from which the base was read, without links
    max_seq_length: int
    lora: LoraConfig | None = None
    recompute: Recompute = "selective"
    compile: Compile = "auto"
    kernels: Kernels = "auto"
    deterministic: bool = False
    neftune_alpha: float | None = None  # of the run that trains; noise only where a seed is given
    # Names of base tensors that differ from the checkpoint's, and UNTIED if the head has become a
    # second matrix. save_pretrained writes changed embeddings and heads, and refuses the rest.
    changed: tuple[str, ...] = ()
    # Of a stack whose adapters have different scalings: for each layer pairs of (projection, each
    # adapter's scaling divided by that in `lora.targets`). Empty if the scalings are equal.
    stack_factors: tuple[tuple[tuple[str, tuple[float, ...]], ...], ...] = ()

    def resolved(self, device: torch.device | str) -> "Spec":
        """This spec with the settings that a call on `device` would run with, here and now.

        "auto" becomes True or False (`compile`) and "triton" or "torch" (`kernels`). Under a
        torch.func transform (grad, vmap, jvp, linearize, ...) or a level of forward_ad, and inside
        the caller's own torch.compile, the answer differs from that outside: call this inside of
        the function that is transformed. There `compile` is False and `kernels` "torch"; under a
        transform `recompute` is "none", since every activation is kept. The results are the same up
        to rounding.

        Raises:
            ValueError: `device` is not a device, or `kernels` is "triton" and it runs no kernels.
        """
        problem = device_problem(device)
        raise_problems(ValueError, "Spec.resolved cannot do this:", [problem] if problem else [])
        transformed, device = transforms_active(), torch.device(device)
        return replace(
            self,
            recompute="none" if transformed else self.recompute,
            compile=compiles(self.compile, device) and not transformed,
            kernels="triton" if kernels_run(device, self.kernels) else "torch",
        )

    @property
    def extras(self) -> Extras:
        """The tensors trained besides LoRA on projections; empty without an adapter."""
        return Extras() if self.lora is None else self.lora.extras

    @property
    def qat_scheme(self) -> str | None:
        """How the model is fake quantised; None: it is not."""
        return None if self.lora is None else self.lora.qat_scheme


def is_recompute(value: Any) -> bool:
    """Whether a value names a recompute policy or is a budget in [0, 1]."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0 <= value <= 1
    return value in POLICIES
