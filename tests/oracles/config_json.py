"""config.json of every model type, and transformers' reading of it."""

import json

from transformers import AutoConfig

MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "mixtral", "qwen3_moe"),
    *(
        "ministral",
        "internlm3",
        "seed_oss",
        "cwm",
        "ernie4_5",
        "helium",
        "phi3",
        "olmo2",
        "granite",
    ),
)
NO_BIAS = ("mistral", "mixtral", "ministral", "cwm", "phi3")
MLP_BIAS = ("llama", "granite", "smollm3", "internlm3", "seed_oss", "cwm", "ernie4_5", "helium")
NO_WINDOW = (
    "llama",
    "granite",
    "granitemoehybrid",
    "internlm3",
    "seed_oss",
    "ernie4_5",
    "helium",
    "olmo2",
)
WINDOWED = ("olmo3", "gemma2", "gemma3_text")  # some layers of each, by a pattern

SIZES = dict(
    vocab_size=96,
    hidden_size=512,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=32,
)

LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512
)


def raw_config(model_type: str = "llama", **changed) -> dict:
    # Helium's default of 20 key heads does not divide 32 heads.
    sizes = SIZES | ({"num_key_value_heads": 4} if model_type == "helium" else {})
    return {"model_type": model_type, **sizes, **changed}


def transformers_says(raw: dict) -> dict:
    """The same facts, from transformers' class and the lines of its model that read it."""
    c = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    c.standardize_rope_params()  # as every rotary table does once more before it is computed
    n, family = c.num_hidden_layers, c.model_type
    window = getattr(c, "sliding_window", None)
    if family in NO_WINDOW:
        window = None
        types = ("full_attention",) * n
    elif family in ("mistral", "mixtral", "qwen3_moe", "phi3"):
        types = ("full_attention" if window is None else "sliding_attention",) * n
    else:
        types = tuple(c.layer_types)
    if family == "ernie4_5":  # its class has one switch
        c.attention_bias = c.mlp_bias = bool(c.use_bias)
    bias = family == "qwen2" or (family not in NO_BIAS and c.attention_bias)
    output_bias = bias and family not in ("qwen2", "helium")
    eos = c.eos_token_id
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = c.rope_parameters
    of_full, of_sliding = rope.get("full_attention", rope), rope.get("sliding_attention", rope)
    plain = lambda x: tuple(x) if isinstance(x, list) else x
    without_type = lambda x: {k: plain(v) for k, v in x.items() if k != "type"}
    of_full, of_sliding = without_type(of_full), without_type(of_sliding)
    rotary = of_full.pop("partial_rotary_factor", 1.0)
    of_sliding.pop("partial_rotary_factor", None)
    apart = "sliding_attention" in types and of_sliding != of_full
    return dict(
        num_key_value_heads=c.num_key_value_heads,
        head_dim=head_dim,
        rope_dim=int(head_dim * rotary),
        fused_projections=family == "phi3",
        shared_mlp=family == "granitemoehybrid",
        rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings,
        attention_bias=bias,
        attention_output_bias=getattr(c, "attention_out_bias", output_bias),
        mlp_bias=family in MLP_BIAS and c.mlp_bias,
        qk_norm=family in ("qwen3", "qwen3_moe", "olmo2", "olmo3", "gemma3_text"),
        qk_norm_joint=family.startswith("olmo"),
        **_scales(c),
        layer_types=types,
        sliding_window=window if "sliding_attention" in types else None,
        no_rope_layers=tuple(c.no_rope_layers[:n]) if family == "smollm3" else (1,) * n,
        bos_token_id=c.bos_token_id,
        eos_token_id=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        rope_of_neighbours=family in ("ernie4_5", "helium"),
        pad_token_id=c.pad_token_id,
        **experts(c),
        rope_parameters=of_full,
        sliding_rope_parameters=of_sliding if apart else None,
    )


def _scales(c) -> dict:
    """The fields that Gemma's model classes read."""
    gemma, granite = c.model_type.startswith("gemma"), c.model_type.startswith("granite")
    embedding = c.hidden_size**0.5 if gemma else c.embedding_multiplier if granite else None
    attention = c.attention_multiplier if granite else None
    return dict(
        embedding_scale=embedding,
        scales_decoder_input=granite,
        residual_scale=c.residual_multiplier if granite else 1.0,
        logit_divisor=c.logits_scaling if granite else 1.0,
        attention_scale=c.query_pre_attn_scalar**-0.5 if gemma else attention,
        attention_cap=c.attn_logit_softcapping if c.model_type == "gemma2" else None,
        logit_cap=c.final_logit_softcapping if gemma else None,
        activation="gelu_tanh" if gemma else "silu",
    )


def experts(c) -> dict:
    """The fields of a mixture that transformers' model classes read. Dense families get zeros."""
    n = c.num_hidden_layers
    if not getattr(c, "num_experts_per_tok", 0) or not getattr(c, "num_experts", 0):
        sizes = dict(num_local_experts=0, num_experts_per_tok=0, moe_intermediate_size=0)
        return sizes | dict(norm_topk_prob=False, sparse_layers=(False,) * n)
    mixtral = c.model_type == "mixtral"
    dense = [] if mixtral else c.mlp_only_layers
    step = 1 if mixtral else c.decoder_sparse_step
    return dict(
        num_local_experts=c.num_experts,
        num_experts_per_tok=c.num_experts_per_tok,
        moe_intermediate_size=c.intermediate_size if mixtral else c.moe_intermediate_size,
        norm_topk_prob=mixtral or c.norm_topk_prob,
        sparse_layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(n)),
    )
