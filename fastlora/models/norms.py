"""The RMSNorms of a decoder layer: where they are, and their names in the layer's tree.

places     x + attention:                                x + MLP:
before     x + attn(norm(x))                             x + mlp(norm(x))
after      x + norm(attn(x))                             x + norm(mlp(x))
around     x + norm(attn(norm(x)))                       x + norm(mlp(norm(x)))
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from fastlora.models.config import NormKind, NormPlaces
from fastlora.models.params import LayerParams
from fastlora.ops.rms_norm import rms_norm


class LayerNorms(NamedTuple):
    """The norms at both ends of attention and MLP: keys of the layer's tree; None: no norm."""

    attention_in: str | None
    attention_out: str | None
    mlp_in: str | None
    mlp_out: str | None

    def names(self) -> tuple[str, ...]:
        """The norms that exist, in the order of computation."""
        return tuple(name for name in self if name is not None)


_LAYER_NORMS: dict[NormPlaces, LayerNorms] = {
    "before": LayerNorms("input_layernorm", None, "post_attention_layernorm", None),
    "after": LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "around": LayerNorms(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


def layer_norms(places: NormPlaces) -> LayerNorms:
    """The norms of every layer of a model, from `LlamaConfig.norms`."""
    return _LAYER_NORMS[places]


def normed(
    x: Float[Tensor, "*b d"], params: LayerParams, name: str | None, eps: float, kind: NormKind
) -> Float[Tensor, "*b d"]:
    """x through one of a layer's norms; x itself if there is none at this place."""
    return x if name is None else rms_norm(x, params[name], eps, kind)
