"""What a Llama-family checkpoint is, without its weights: the shape that config.json gives."""

from dataclasses import dataclass, field
from typing import Literal

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]

LayerType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeParameters:
    """Rotary position embedding settings, with every default resolved.

    Field names are those of transformers 5's `rope_parameters`; old files that say `rope_theta` and
    `rope_scaling` are read into the same record.
    """

    rope_type: RopeType = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None  # set for llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn; None: derived from factor and the mscales
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Static shape of a Llama-family model. Hashable, so torch.compile may specialise on it.

    Field names are those of Hugging Face's config.json: one vocabulary from disk to error message.
    Family differences are settled here, once, as per-layer facts; nothing later asks for
    `model_type`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: RopeParameters
    tie_word_embeddings: bool
    attention_bias: bool  # q_proj, k_proj, v_proj have a bias
    attention_output_bias: bool  # o_proj has one (Llama: as the others; Qwen2: never)
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over head_dim on q and k before RoPE (Qwen3)
    layer_types: tuple[LayerType, ...]  # one entry per layer
    sliding_window: int | None  # positions a sliding layer sees, itself included
    no_rope_layers: tuple[int, ...]  # one entry per layer, 1 = has RoPE (SmolLM3's spelling)
    sparse_layers: tuple[bool, ...]  # one entry per layer: a mixture of experts, or one dense MLP
    num_local_experts: int  # of a sparse layer; 0 where no layer is sparse
    num_experts_per_tok: int
    norm_topk_prob: bool  # the chosen experts' weights are made to sum to 1
    moe_intermediate_size: int  # of one expert
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]  # config.json and generation_config.json together
    pad_token_id: int | None
    dtype: str  # of the weights: "float32", "bfloat16", "float16" or "float64"
    raw_json: str = field(repr=False)  # config.json as it was read, for the export of merged models
