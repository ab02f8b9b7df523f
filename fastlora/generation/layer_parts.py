"""A layer's projections as the parts of products (ops/decode/product.py)."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.generation.prepare import PreparedLayer
from fastlora.models.init_offset import a_with_offset, b_with_offset
from fastlora.models.layer_spec import LayerSpec
from fastlora.models.params import BiasedLoRA, DoRA, ExpertLoRA, PreparedDoRA
from fastlora.ops.decode.product import Part
from fastlora.ops.quant.weights import shape_of


def parts_of(layer: PreparedLayer, *names: str) -> list[Part]:
    """The projections `names` with their adapters."""
    return [_part(layer, name) for name in names]


def halves_of(layer: PreparedLayer, name: str) -> list[Part]:
    """The halves of the layer that computes gate and up; all of it if its weight is quantised and
    has no rows."""
    part = _part(layer, name)
    if not isinstance(part.weight, Tensor):
        return [part]
    halves = lambda x: (None, None) if x is None else x.chunk(2)
    rows = (part.weight, part.b, part.gain, part.bias)
    return [
        Part(weight, part.a, matrix_b, part.scaling, gain, bias)
        for weight, matrix_b, gain, bias in zip(*map(halves, rows), strict=True)
    ]


def _part(layer: PreparedLayer, name: str) -> Part:
    """A projection with its adapter: LoRA, its bias or DoRA's gain, and an initial offset."""
    linear, lora = layer.params[name], layer.adapter.get(name)
    weight, bias = linear["weight"], linear.get("bias")
    if lora is None:
        return _scaled(Part(weight, bias=bias), layer.spec, name)
    assert not isinstance(lora, DoRA | ExpertLoRA), type(lora)  # prepare() leaves no DoRA
    scaling = dict(layer.spec.scalings)[name]
    a, matrix_b = a_with_offset(lora, linear), b_with_offset(lora, linear)
    gain = lora.gain if isinstance(lora, PreparedDoRA) else None
    if isinstance(lora, BiasedLoRA):
        lora_bias = scaling * lora.bias.float()
        bias = lora_bias if bias is None else bias + lora_bias
    return _scaled(Part(weight, a, matrix_b, scaling, gain, bias), layer.spec, name)


def _scaled(part: Part, spec: LayerSpec, name: str) -> Part:
    """The part times `residual_scale` if its product is added to the residual."""
    scale = spec.residual_scale
    if scale == 1.0 or name not in ("o_proj", "down_proj", "output_linear"):
        return part
    rows, device = shape_of(part.weight)[0], tree_leaves(part.weight)[0].device
    gain = torch.ones(rows, dtype=torch.float32, device=device) if part.gain is None else part.gain
    return part._replace(gain=scale * gain, bias=None if part.bias is None else scale * part.bias)
