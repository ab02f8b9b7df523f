"""Everything about a model that is not a tensor: frozen, hashable, passed whole."""

from dataclasses import dataclass
from typing import Any, Literal

from fastlora.models.config import LlamaConfig
from fastlora.ops.dispatch import Kernels
from fastlora.runtime.compiled import Compile

Recompute = Literal["none", "selective", "full", "offload"] | float

POLICIES = ("none", "selective", "full", "offload")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One projection that carries LoRA, with its patterns already resolved."""

    name: str  # of params.TARGETS: "q_proj", "gate", "experts.down_proj"
    r: int
    lora_alpha: float
    scaling: float  # lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What an adapter trains beside its projections, with every name and pattern resolved."""

    embed_tokens: Target | None = None  # LoRA on the embedding, and on the head
    lm_head: Target | None = None
    tied: bool = False  # the head's LoRA or copy is the embedding's, transposed
    replaced: tuple[str, ...] = ()  # names on disk of tensors of which a copy is trained
    # "embed_tokens" and "lm_head" -> the ids whose rows are trained, in the order of the rows.
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()
    shared_rows: bool = False  # the head of a tied model has the embedding's trained rows too


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """LoRA settings as the user gave them (PEFT's names), and what they resolved to: `targets` in
    the layers, `extras` elsewhere."""

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
    qat_scheme: str | None = None  # a key of ops.fake_quantize.SCHEMES
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    # Ids of the embedding, or (module, ids) pairs.
    trainable_token_indices: tuple[Any, ...] = ()
    extras: Extras = Extras()
    targets: tuple[tuple[Target, ...], ...]  # one tuple per layer, in params.TARGETS order


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How to run a model: its shape, its adapter's shape, and the choices that touch no tensor."""

    config: LlamaConfig
    name_or_path: str  # what load() was given; the adapter's base_model_name_or_path
    max_seq_length: int
    lora: LoraConfig | None = None
    recompute: Recompute = "selective"
    compile: Compile = "auto"
    kernels: Kernels = "auto"
    deterministic: bool = False
    changed: tuple[str, ...] = ()  # names of base tensors that are not the checkpoint's any more

    @property
    def extras(self) -> Extras:
        """What is trained beside the projections; nothing without an adapter."""
        return Extras() if self.lora is None else self.lora.extras

    @property
    def qat_scheme(self) -> str | None:
        """How the model is fake quantised; None: not at all."""
        return None if self.lora is None else self.lora.qat_scheme


def is_recompute(value: Any) -> bool:
    """Whether a value names a recompute policy or is a budget in [0, 1]."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0 <= value <= 1
    return value in POLICIES
