"""LlamaConfig: the shape of a Llama-like checkpoint, without its weights."""

from dataclasses import dataclass, field
from typing import Literal

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

LayerType = Literal["full_attention", "sliding_attention"]

NormPlaces = Literal["before", "after", "around"]  # of attention and MLP; see norms.py

NormKind = Literal["narrow", "wide", "one_plus"]  # as in ops/rms_norm.py, which needs torch

Activation = Literal["silu", "gelu_tanh"]  # of the MLP's gate: SwiGLU or GeGLU


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeParameters:
    """Settings of rotary position embeddings, with every default filled in.

    Field names are those of transformers 5's `rope_parameters`. Files in the older spelling, with
    `rope_theta` and `rope_scaling`, are read into the same record.
    """

    rope_type: RopeType = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None  # set for llama3, yarn and longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    # yarn; None: derived from factor and the mscales. longrope; None: derived from factor.
    attention_factor: float | None = None
    # longrope: divisors of the frequencies, in sequences of up to original_max_position_embeddings
    # tokens and in longer ones.
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Static shape of a Llama-like model. It is hashable, so torch.compile may specialise on it.

    Field names are those of Hugging Face's config.json. Differences between families are facts of
    the model or of each layer here (`qk_norm`, `layer_types`, `sparse_layers`, ...), and the
    decoder reads only these. `model_type` is the key of the family's record
    (families/registry.py). Once the config is read, that record is asked for names only: those of
    experts in files, of tokenizer classes, and of PEFT's default targets.
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
    attention_output_bias: bool  # o_proj has one (Llama: if the others have; Qwen2: never)
    mlp_bias: bool
    qk_norm: bool  # RMSNorm on q and k before RoPE, over head_dim (Qwen3)
    # q_proj, k_proj and v_proj are one linear layer, and so are gate_proj and up_proj (Phi-3).
    fused_projections: bool
    shared_mlp: bool  # the MLP is input_linear (gate and up) and output_linear (Granite 4)
    rope_dim: int  # the first dimensions of each head are rotated (Phi-4-mini: 96 of 128)
    rope_of_neighbours: bool  # RoPE turns dimensions 2 i and 2 i + 1, not i and i + hd / 2 (Helium)
    layer_types: tuple[LayerType, ...]  # one entry per layer
    sliding_window: int | None  # positions that a sliding layer sees, the query's included
    no_rope_layers: tuple[int, ...]  # one entry per layer; 1 = has RoPE (SmolLM3's spelling)
    sparse_layers: tuple[bool, ...]  # one entry per layer; True: mixture of experts, False: one MLP
    num_local_experts: int  # in each sparse layer; 0 if no layer is sparse
    num_experts_per_tok: int
    norm_topk_prob: bool  # the chosen experts' weights are scaled to sum to 1
    moe_intermediate_size: int  # width of one expert
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]  # of config.json and generation_config.json together
    pad_token_id: int | None
    dtype: str  # of the weights: "float32", "bfloat16", "float16" or "float64"
    norms: NormPlaces = "before"
    norm_kind: NormKind = "narrow"  # how RMSNorm multiplies with its weight
    qk_norm_joint: bool = False  # with qk_norm: one norm over all heads of q, and one of k (OLMo 2)
    activation: Activation = "silu"
    attention_scale: float | None = None  # factor of the scores; None: 1 / sqrt(head_dim)
    attention_cap: float | None = None  # scores s become cap * tanh(s / cap)
    logit_cap: float | None = None  # the same of the logits
    embedding_scale: float | None = None  # factor of the embedding, rounded to its dtype
    # The factor is not rounded, and multiplies NEFTune's noise too (Granite).
    scales_decoder_input: bool = False
    residual_scale: float = 1.0  # factor of the outputs of attention and MLP in the residual sums
    logit_divisor: float = 1.0  # the logits are divided by it
    # RoPE of sliding layers; None: that of all layers is `rope_parameters`.
    sliding_rope_parameters: RopeParameters | None = None
    # model_type of the checkpoint with a vision tower (families/registry.WRAPPERS) that this text
    # model is a part of. `model_type` is then that of its text_config.
    wrapper: str | None = None
    raw_json: str = field(repr=False)  # unchanged text of config.json, for exports of merged models
    # The same of generation_config.json; None: the folder has no such file.
    raw_generation_json: str | None = field(default=None, repr=False)
