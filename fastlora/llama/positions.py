"""Where each token stands and what it may see: position ids, RoPE tables, attention masks."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.llama.config import LlamaConfig, RopeParameters


def positions(
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    segment_ids: Int[Tensor, "b t"] | None,
) -> Int[Tensor, "#b t"]:
    """Where the user gave none: positions restart with each segment and count real tokens."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if segment_ids is not None:
        return index - _document_begins(segment_ids)
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return index


def segment_starts(segment_ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """True at the first token of each run of equal segment ids."""
    first = torch.ones_like(segment_ids[:, :1], dtype=torch.bool)
    return torch.cat((first, segment_ids[:, 1:] != segment_ids[:, :-1]), dim=1)


def _document_begins(segment_ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """For each token the index of its document's first. An id that comes again is another one."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    return torch.where(segment_starts(segment_ids), index, 0).cummax(-1).values


def first_seen(
    t: int, window: int | None, segment_ids: Int[Tensor, "b t"] | None, device: torch.device
) -> Int[Tensor, "#b t"]:
    """For each query the index of the first key it may see; the last is its own."""
    index = torch.arange(t, device=device)[None]
    first = torch.zeros_like(index) if segment_ids is None else _document_begins(segment_ids)
    return first if window is None else torch.maximum(first, index - window + 1)


def attention_mask_2d(
    t: int,
    window: int | None,
    attention_mask: Int[Tensor, "b t"] | None,
    segment_ids: Int[Tensor, "b t"] | None,
    device: torch.device,
) -> Bool[Tensor, "#b 1 t t"] | None:
    """True where query i may see key j; None where that is plain causal.

    A token sees itself always, padding included, so that no softmax row is empty.
    """
    if (window is None or window >= t) and attention_mask is None and segment_ids is None:
        return None
    i = torch.arange(t, device=device)
    first = first_seen(t, window, segment_ids, device)
    allowed = (i[:, None] >= i) & (i >= first[..., None])
    if attention_mask is not None:
        allowed = allowed & (attention_mask[:, None, :].bool() | (i[:, None] == i))
    return allowed[:, None]


def sequence_lengths(
    position_ids: Int[Tensor, "b t"], segment_ids: Int[Tensor, "b t"] | None
) -> Int[Tensor, "b #t"]:
    """Length of each token's sequence: of its row, or of its document in a packed row."""
    if segment_ids is None:
        return position_ids.amax(-1, keepdim=True) + 1
    t = segment_ids.shape[1]
    index = torch.arange(t, device=segment_ids.device)
    ends = F.pad(segment_starts(segment_ids)[:, 1:], (0, 1), value=True)
    last = torch.where(ends, index, t - 1).flip(-1).cummin(-1).values.flip(-1)
    return position_ids.expand_as(segment_ids).gather(1, last) + 1


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
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = (trained / wavelength - low) / (high - low)
    blended = (1 - blend) * plain / rope.factor + blend * plain
    slowed = torch.where(wavelength > trained / low, plain / rope.factor, blended)
    return torch.where(wavelength < trained / high, plain, slowed)


def _yarn(rope: RopeParameters, hd: int, plain: Tensor) -> tuple[Tensor, float]:
    """Interpolate the slow pairs, extrapolate the fast ones, ramp between; sharpen attention."""
    trained = float(rope.original_max_position_embeddings or 0)

    def pair_turning(turns: float) -> float:
        """Index of the pair that makes `turns` full turns over the trained length."""
        return hd * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, hd - 1)
    index = torch.arange(hd // 2, device=plain.device).to(plain.dtype)
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeParameters) -> float:
    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
