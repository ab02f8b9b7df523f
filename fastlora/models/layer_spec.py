"""LayerSpec: the settings of one layer, which its compiled graph depends on."""

from dataclasses import dataclass

from fastlora.models.config import Activation, NormKind
from fastlora.models.norms import LayerNorms, layer_norms
from fastlora.models.spec import Spec
from fastlora.ops.attention.context_group import ContextGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """The settings of one layer. Layers with equal settings share one compiled graph."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    norms: LayerNorms
    norm_kind: NormKind
    activation: Activation
    attention_scale: float | None  # None: 1 / sqrt(head_dim)
    attention_cap: float | None
    residual_scale: float
    rope: bool
    rope_dim: int
    rope_of_neighbours: bool
    scalings: tuple[tuple[str, float], ...]  # projection -> factor of its low-rank term
    lora_dropout: float
    qat_scheme: str | None
    deterministic: bool
    num_experts_per_tok: int
    norm_topk_prob: bool
    fused: bool  # whether Triton kernels run
    context: ContextGroup | None  # the ranks that have rows together
    replaced: tuple[str, ...]  # tensors that are trained copies: their gradients change the graph

    @property
    def in_order(self) -> bool:
        """Whether RoPE pairs dimension i with i + hd / 2, as its kernels do (`rope.in_halves`)."""
        return self.rope_dim == self.head_dim and not self.rope_of_neighbours


def layer_spec(
    spec: Spec,
    layer: int,
    *,
    fused: bool = False,
    stacked: bool = False,
    context: ContextGroup | None = None,
) -> LayerSpec:
    """The part of `spec` that a layer depends on.

    Args:
        spec: the model's.
        layer: number of the layer.
        fused: whether Triton kernels run.
        stacked: whether the layer runs a stack of adapters, in which B contains the scalings. One
            graph then serves all scalings.
        context: the ranks that have rows together; None: rows are whole.
    """
    config, lora, prefix = spec.config, spec.lora, f"model.layers.{layer}."
    copies = [name for name in spec.extras.replaced if name.startswith(prefix)]
    return LayerSpec(
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        norms=layer_norms(config.norms),
        norm_kind=config.norm_kind,
        activation=config.activation,
        attention_scale=config.attention_scale,
        attention_cap=config.attention_cap,
        residual_scale=config.residual_scale,
        rope=bool(config.no_rope_layers[layer]),
        rope_dim=config.rope_dim,
        rope_of_neighbours=config.rope_of_neighbours,
        scalings=()
        if lora is None or stacked
        else tuple((t.name, t.scaling) for t in lora.targets[layer]),
        lora_dropout=lora.lora_dropout if lora else 0.0,
        qat_scheme=spec.qat_scheme,
        deterministic=spec.deterministic,
        # 0 in dense layers, which do not depend on it.
        num_experts_per_tok=config.num_experts_per_tok if config.sparse_layers[layer] else 0,
        norm_topk_prob=config.norm_topk_prob,
        fused=fused,
        context=context,
        replaced=tuple(name.removeprefix(prefix) for name in copies),
    )
