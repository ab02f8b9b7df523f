"""cos and sin of rotary position embeddings, for every kind of RoPE scaling."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.config import LlamaConfig, RopeParameters


def layer_rope(config: LlamaConfig, layer_type: str) -> RopeParameters:
    """RoPE's settings in the layers of a type."""
    if layer_type == "sliding_attention" and config.sliding_rope_parameters is not None:
        return config.sliding_rope_parameters
    return config.rope_parameters


def tables_by_type(
    config: LlamaConfig,
    position_ids: Int[Tensor, "b t"],
    lengths: Int[Tensor, "b #t"],
    dtype: torch.dtype,
) -> dict[str, tuple[Float[Tensor, "b t hd"], Float[Tensor, "b t hd"]]]:
    """Layer type -> its `rope_tables`; the same tensors for types with equal settings."""
    made: dict[RopeParameters, tuple[Tensor, Tensor]] = {}
    found = {}
    for layer_type in sorted(set(config.layer_types)):
        rope = layer_rope(config, layer_type)
        if rope not in made:
            made[rope] = rope_tables(config, position_ids, lengths, dtype, rope)
        found[layer_type] = made[rope]
    return found


def rope_tables(
    config: LlamaConfig,
    position_ids: Int[Tensor, "b t"],
    lengths: Int[Tensor, "b #t"],
    dtype: torch.dtype,
    rope: RopeParameters | None = None,
) -> tuple[Float[Tensor, "b t hd"], Float[Tensor, "b t hd"]]:
    """cos and sin of every position's angles in `dtype`, computed in float32 or wider.

    Args:
        config: the model's shape.
        position_ids: of every token.
        lengths: of every token's sequence; only dynamic RoPE and LongRoPE use them. transformers
            uses the longest length of the batch instead, so that a row's logits depend on its
            neighbours.
        dtype: of the tables.
        rope: settings; None: `config.rope_parameters`.
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequencies, attention_factor = rope_frequencies(config, lengths, wide, rope)
    # In bfloat16 an angle at position 1,000 would be off by up to 4 radians.
    angles = position_ids.to(wide)[..., None] * frequencies
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    if config.rope_dim < config.head_dim:  # some are not rotated (ops/attention/rope.in_halves)
        still = (0, (config.head_dim - config.rope_dim) // 2)
        cos, sin = F.pad(cos, still, value=1.0), F.pad(sin, still)
    # Hugging Face's layout: dimension i is rotated together with dimension i + hd / 2.
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((sin, sin), dim=-1).to(dtype)


def longrope_length(config: LlamaConfig) -> int | None:
    """The longest sequence with LongRoPE's short factors; None for other kinds of RoPE."""
    rope = config.rope_parameters
    return rope.original_max_position_embeddings if rope.rope_type == "longrope" else None


def rope_frequencies(
    config: LlamaConfig,
    lengths: Int[Tensor, "b #t"],
    dtype: torch.dtype,
    rope: RopeParameters | None = None,
) -> tuple[Float[Tensor, "*bt half"], float]:
    """Angle per position of each pair of dimensions, and the factor on cos and sin.

    `rope` are the settings; None: `config.rope_parameters`.

    Sources: linear and dynamic, reddit's kaiokendev and emozilla, in the form of
    huggingface/transformers modeling_rope_utils.py (v5.23); llama3, meta-llama/llama-models;
    yarn, Peng et al. 2023, arXiv:2309.00071; longrope, Ding et al. 2024, arXiv:2402.13753.
    """
    rope, hd = rope or config.rope_parameters, config.rope_dim
    exponents = torch.arange(0, hd, 2, device=lengths.device).to(dtype) / hd
    unscaled = 1.0 / rope.rope_theta**exponents
    if rope.rope_type == "linear":
        return unscaled / rope.factor, 1.0
    if rope.rope_type == "dynamic":
        return _dynamic(config, rope, lengths, exponents), 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, unscaled), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, hd, unscaled)
    if rope.rope_type == "longrope":
        return _longrope(rope, lengths, unscaled), _longrope_attention_factor(rope)
    return unscaled, 1.0


def _dynamic(
    config: LlamaConfig, rope: RopeParameters, lengths: Tensor, exponents: Tensor
) -> Tensor:
    """theta grows with the sequence once this is longer than the trained context."""
    hd, trained = config.rope_dim, config.max_position_embeddings
    # Sequences within the trained context get growth = 1, the unscaled frequencies.
    length = lengths.clamp(min=trained).to(exponents.dtype)[..., None]
    growth = rope.factor * length / trained - (rope.factor - 1)
    theta = rope.rope_theta * growth ** (hd / (hd - 2))
    return 1.0 / theta**exponents


def _llama3(rope: RopeParameters, unscaled: Tensor) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, and those in between blended."""
    trained = float(rope.original_max_position_embeddings or 0)
    wavelength = 2 * math.pi / unscaled
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = (trained / wavelength - low) / (high - low)
    blended = (1 - blend) * unscaled / rope.factor + blend * unscaled
    # The blend is between 0 and 1 only for the waves in between; the two torch.where replace it for
    # all others.
    slowed = torch.where(wavelength > trained / low, unscaled / rope.factor, blended)
    return torch.where(wavelength < trained / high, unscaled, slowed)


def _longrope(rope: RopeParameters, lengths: Tensor, unscaled: Tensor) -> Tensor:
    """One divisor for each frequency, of two sets: that of a sequence depends on its length."""
    # Filled one by one: torch.tensor would copy from pageable host memory, which waits for the GPU
    # and which a CUDA graph cannot record.
    factors = (rope.short_factor, rope.long_factor)
    short, long = (torch.stack([unscaled.new_full((), x) for x in row]) for row in factors)
    is_long = lengths[..., None] > (rope.original_max_position_embeddings or 0)
    return unscaled / torch.where(is_long, long, short)


def _longrope_attention_factor(rope: RopeParameters) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(
        1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings or 0)
    )


def _yarn(rope: RopeParameters, hd: int, unscaled: Tensor) -> tuple[Tensor, float]:
    """Interpolate slow pairs, extrapolate fast ones, blend those in between; scale attention."""
    trained = float(rope.original_max_position_embeddings or 0)

    def pair_turning(turns: float) -> float:
        """Index of the pair that makes `turns` full turns over the trained length."""
        return hd * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, hd - 1)
    index = torch.arange(hd // 2, device=unscaled.device).to(unscaled.dtype)
    # 1e-3 avoids a division by zero if both bounds fall on one pair.
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    return unscaled / rope.factor * ramp + unscaled * (1 - ramp), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeParameters) -> float:
    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    # Two scales are DeepSeek's generalisation. The paper's formula is that of one scale, 1.
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
