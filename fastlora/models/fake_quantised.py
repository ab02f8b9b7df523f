"""A projection with its adapter under fake quantisation."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.models.params import AdapterRecord, BiasedLoRA, DoRA, Linear
from fastlora.ops.linear.qat import qat_linear


def fake_quantised(
    x: Float[Tensor, "b t d_in"],
    linear: Linear,
    lora: AdapterRecord | None,
    scaling: float,
    scheme: str,
) -> Float[Tensor, "b t d_out"]:
    """One projection as it would compute after merging and quantising."""
    weight, bias = linear["weight"], linear.get("bias")
    assert isinstance(weight, Tensor), "lora() refuses qat_scheme over a quantised base"
    if lora is None:  # merging does not change it, but it is quantised too
        return qat_linear(x, weight, bias, None, None, None, scaling, scheme)
    if isinstance(lora, BiasedLoRA):  # merging adds this bias to the base's
        wide = torch.promote_types(lora.bias.dtype, torch.float32)
        lora_bias = scaling * lora.bias.to(wide)
        bias = (lora_bias if bias is None else bias + lora_bias).to(x.dtype)
    magnitude = lora.magnitude if isinstance(lora, DoRA) else None
    return qat_linear(x, weight, bias, lora.a, lora.b, magnitude, scaling, scheme)
