"""Family: everything that differs between families of Llama-like models.

`config_json.py` reads a config.json by its family's record into a `LlamaConfig`, whose per-layer
facts are all that the decoder looks at. Readers of weights, tokenizers and PEFT folders ask the
record for names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastlora.models.config import Activation, NormKind, NormPlaces

# Meanings of absent fields that most families share. These and each family's own are those of
# transformers 5.23's configuration classes (tests/models/test_config_json.py compares them).
SHARED_DEFAULTS: Mapping[str, Any] = dict(
    num_key_value_heads=None,  # null: as many as query heads
    head_dim=None,  # null: hidden_size / num_attention_heads
    hidden_act="silu",
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
    layer_types=None,
    no_rope_layers=None,
    no_rope_layer_interval=4,
    rope_parameters=None,
)

# Values for `Family.fixed` that several families share.
NO_WINDOW: Mapping[str, Any] = dict(
    use_sliding_window=False, sliding_window=None, layer_types=None, max_window_layers=0
)
ONE_WINDOW: Mapping[str, Any] = dict(use_sliding_window=True, max_window_layers=0)  # in all layers
NO_BIAS: Mapping[str, Any] = dict(attention_bias=False, mlp_bias=False)
ALL_ROPE: Mapping[str, Any] = dict(no_rope_layers=None, no_rope_layer_interval=None)
ALL_SPARSE: Mapping[str, Any] = dict(mlp_only_layers=None, decoder_sparse_step=1)


class Experts(NamedTuple):
    """How a family of mixtures of experts spells its experts."""

    module: str  # the sparse block, in files that hold one tensor per expert and matrix
    matrices: tuple[str, str, str]  # gate, up and down of one expert, in the same files
    # Fields of config.json with the number of experts; the first one present counts. transformers
    # accepts an alias besides each class's own field, and the alias wins.
    count_fields: tuple[str, ...]
    size_field: str  # field of config.json with the width of one expert


class TokenizerClass(NamedTuple):
    """Which tokenizer class transformers' AutoTokenizer builds for a family."""

    name: str | None = None  # if the folder declares no class; None: tokenizer.json is used as is
    ignores_declared: bool = False  # True: `name` is built although the folder declares another


class SlidingRope(NamedTuple):
    """RoPE of a family whose sliding layers have other settings than its full layers.

    config.json has them in `rope_parameters` by layer type, or in older fields: `rope_theta` and
    `rope_scaling` for full layers, and `field` for sliding ones.
    """

    theta: float  # of sliding layers, if the file has none
    field: str | None = None  # the older field of config.json with this theta


class GGUF(NamedTuple):
    """What llama.cpp's architecture for a family computes, so that a GGUF file can be written.

    Source: conversion/ and src/models/ of ggml-org/llama.cpp. A model that needs more than its
    architecture computes is refused (formats/gguf/metadata.py).
    """

    arch: str  # general.architecture in the file
    # True: its RoPE turns neighbours, dimensions 2 i and 2 i + 1, so the rows of q and k move.
    rope_of_neighbours: bool = False
    rope_factors: bool = False  # it reads rope_freqs.weight, with which llama3's RoPE is written
    length_factors: bool = False  # it reads LongRoPE's two sets of factors
    any_head_dim: bool = True  # False: head_dim must be hidden_size / num_attention_heads
    biases: tuple[str, ...] = ()  # projections whose bias it adds
    no_rope_interval: int | None = None  # llama.cpp leaves RoPE out of every n-th layer
    multipliers: bool = False  # it reads those of embedding, residuals, scores and logits
    windows: bool = False  # it has sliding windows, in layers of any choice
    # Theta of its sliding layers, which have no other settings of RoPE; None: that of full layers.
    sliding_theta: float | None = None
    head_cap: bool = False  # it caps logits; with `score_cap` also scores, and then always both
    score_cap: bool = False
    # (a projection, the projections whose names its rows get in the file, in equal parts).
    parts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    # With so many layers its scores are scaled by hidden_size / num_attention_heads, else by
    # head_dim. None: always by head_dim.
    scaled_by_width: int | None = None


QKV_BIASES = ("q_proj", "k_proj", "v_proj")
ALL_BIASES = (*QKV_BIASES, "o_proj", "gate_proj", "up_proj", "down_proj")

DECLARED_CLASS = TokenizerClass()  # the class that the folder declares, if it declares one


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models. `defaults` and `fixed` use the field names of config.json."""

    name: str  # config.json's model_type
    models: str = ""  # published models, for README.md; "": the name says it
    defaults: Mapping[str, Any]  # meanings of absent fields, on top of SHARED_DEFAULTS
    fixed: Mapping[str, Any]  # values that replace those of config.json
    qk_norm: bool = False  # RMSNorm over head_dim on q and k, before RoPE
    qk_norm_joint: bool = False  # that norm is one over all heads
    norms: NormPlaces = "before"  # where a layer's norms are; see models/norms.py
    norm_kind: NormKind = "narrow"  # how they multiply; see ops/rms_norm.py
    activation: Activation = "silu"
    activation_field: str = "hidden_act"  # of config.json
    scaled_embedding: bool = False  # the embedding is multiplied with sqrt(hidden_size)
    # Fields of config.json that other families do not read: `config_json.OPTIONAL_FIELDS`.
    reads: tuple[str, ...] = ()
    refused_if_true: tuple[str, ...] = ()  # fields that ask for something fastlora does not compute
    # Without layer_types every n-th layer sees all tokens, and the others have a window.
    full_attention_every: int | None = None
    full_attention_first: bool = False  # True: the first of n sees all, not the last
    sliding_rope: SlidingRope | None = None  # None: RoPE is the same in all layers
    o_proj_bias: bool = True  # with attention_bias o_proj has a bias too, not only q, k and v
    o_proj_bias_field: str | None = None  # config.json's own switch for o_proj's bias
    # (a field of `defaults`, the name that config.json has for it).
    spellings: tuple[tuple[str, str], ...] = ()
    # Files with attention_bias and mlp_bias are refused if the two differ.
    one_bias: bool = False
    rope_of_neighbours: bool = False  # RoPE turns dimensions 2 i and 2 i + 1, not i and i + hd / 2
    partial_rotary: bool = False  # reads partial_rotary_factor; others refuse any but 1
    rope_type_names: tuple[tuple[str, str], ...] = ()  # (a name of its files, ours)
    # One linear layer, qkv_proj, for q, k and v, and one, gate_up_proj, for gate and up.
    fused_projections: bool = False
    # Its MLP is shared_mlp.input_linear, for gate and up, and shared_mlp.output_linear.
    shared_mlp: bool = False
    only: tuple[tuple[str, Any], ...] = ()  # (field, the only supported value)
    layer_type_names: tuple[tuple[str, str], ...] = ()  # (a name of its files, ours)
    # True: the sliding window belongs to the layers without RoPE. False: to the layers from
    # max_window_layers on.
    window_without_rope: bool = False
    same_layer_types: bool = False  # True: config.json may not give layers different windows
    experts: Experts | None = None  # None: a dense family
    tokenizer_class: TokenizerClass = DECLARED_CLASS
    default_targets: tuple[str, ...] = ("q_proj", "v_proj")  # adapted if target_modules is None
    gguf: GGUF | None = None  # None: llama.cpp has no architecture for the family
    peft_has_default: bool = True  # False: PEFT itself needs target_modules for this family
