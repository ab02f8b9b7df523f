"""rope_tables."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.config import LlamaConfig, RopeParameters


def rope_tables(
    config: LlamaConfig,
    position_ids: Int[Tensor, "b t"],
    lengths: Int[Tensor, "b #t"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "b t hd"], Float[Tensor, "b t hd"]]:
    """cos and sin of every position's angles in `dtype`, computed in float32 or wider.

    `lengths` matters to dynamic RoPE alone. It is each sequence's own, so that no row's logits
    depend on a neighbour; transformers takes the longest of the batch.
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequencies, attention_factor = rope_frequencies(config, lengths, wide)
    angles = position_ids.to(wide)[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def rope_frequencies(
    config: LlamaConfig, lengths: Int[Tensor, "b #t"], dtype: torch.dtype
) -> tuple[Float[Tensor, "*bt half"], float]:
    """Angle per position of each pair, and the factor on cos and sin, as transformers 5 has them.

    Sources: linear and dynamic, reddit's kaiokendev and emozilla, in the form of
    huggingface/transformers modeling_rope_utils.py (v5.23); llama3, meta-llama/llama-models;
    yarn, Peng et al. 2023, arXiv:2309.00071.
    """
    rope, hd = config.rope_parameters, config.head_dim
    exponents = torch.arange(0, hd, 2, device=lengths.device).to(dtype) / hd
    plain = 1.0 / rope.rope_theta**exponents
    if rope.rope_type == "linear":
        return plain / rope.factor, 1.0
    if rope.rope_type == "dynamic":
        return _dynamic(config, lengths, exponents), 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, hd, plain)
    return plain, 1.0


def _dynamic(config: LlamaConfig, lengths: Tensor, exponents: Tensor) -> Tensor:
    """theta grows with the sequence, once it is longer than what the model was trained for."""
    rope, hd, trained = config.rope_parameters, config.head_dim, config.max_position_embeddings
    length = lengths.clamp(min=trained).to(exponents.dtype)[..., None]
    growth = rope.factor * length / trained - (rope.factor - 1)
    theta = rope.rope_theta * growth ** (hd / (hd - 2))
    return 1.0 / theta**exponents


def _llama3(rope: RopeParameters, plain: Tensor) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    trained = float(rope.original_max_position_embeddings or 0)
    wavelength = 2 * math.pi / plain
    x_a, high = rope.low_freq_factor, rope.high_freq_factor
    blend = (trained / wavelength - x_a) / (high - x_a)
    blended = (1 - blend) * plain / rope.factor + blend * plain
    slowed = torch.where(wavelength > trained / x_a, plain / rope.factor, blended)
    return torch.where(wavelength < trained / high, plain, slowed)


def _yarn(rope: RopeParameters, hd: int, plain: Tensor) -> tuple[Tensor, float]:
    """Interpolate the slow pairs, extrapolate the fast ones, ramp between; sharpen attention."""
    trained = float(rope.original_max_position_embeddings or 0)

    def pair_turning(turns: float) -> float:
        """Index of the pair that makes `turns` full turns over the trained length."""
        return hd * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    x_a, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        x_a, high = math.floor(x_a), math.ceil(high)
    x_a, high = max(x_a, 0), min(high, hd - 1)
    index = torch.arange(hd // 2, device=plain.device).to(plain.dtype)
    ramp = ((index - x_a) / max(high - x_a, 1e-3)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeParameters) -> float:
    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
