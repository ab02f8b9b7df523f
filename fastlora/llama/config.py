"""What a Llama-family checkpoint is, without its weights: the shape that config.json gives."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fastlora.checks import raise_problems

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

    @classmethod
    def from_hf(
        cls,
        raw: dict[str, Any],
        *,
        generation: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
    ) -> "LlamaConfig":
        """The record of a config.json, read as transformers 5.23 reads it.

        Args:
            raw: config.json. Its JSON types are not trusted.
            generation: generation_config.json; its stop ids join the config's.
            rope_scaling: replaces the file's RoPE settings, all but `rope_theta`, which stays the
                file's unless the dict gives one. Spelled as in config.json: rope_type, factor, ...

        Raises:
            ValueError: listing every field that is missing, impossible, or means something that
                fastlora's model does not compute.
        """
        _check_family(raw.get("model_type"))
        if rope_scaling:
            raw = _with_rope_scaling(raw, rope_scaling)
        defaults, fixed = _FAMILIES[raw["model_type"]]
        settings = _Fields({**_DEFAULTS, **defaults, **raw, **fixed})
        settings.refuse_unsupported()
        read = {name: settings.read(name, expected) for name, expected in _PLAIN.items()}
        read |= _attention_heads(settings, read)
        read |= _layers(settings, read["num_hidden_layers"])
        read |= _experts(settings, read["num_hidden_layers"])
        read |= _token_ids(raw, generation or {}, defaults, settings.problems)
        read["rope_parameters"] = _rope_parameters(settings, read)
        read["dtype"] = settings.dtype()
        cure = "Each line names a field of config.json; correct it, or choose another checkpoint."
        raise_problems(ValueError, "fastlora cannot run this model:", settings.problems, cure)
        return cls(**read, model_type=raw["model_type"], raw_json=json.dumps(raw))

    def to_hf(self) -> dict[str, Any]:
        """config.json for a folder of this model in full precision: the file as read, with what
        fastlora changed."""
        raw = json.loads(self.raw_json)
        raw.pop("quantization_config", None)
        # Both names where both are there: transformers 5 prefers dtype, 4 reads torch_dtype.
        for name in {"dtype", "torch_dtype"} & raw.keys() or {"dtype"}:
            raw[name] = self.dtype
        changed = {"vocab_size": self.vocab_size, "tie_word_embeddings": self.tie_word_embeddings}
        return raw | changed


# ── the families ──────────────────────────────────────────────────────────────────────────
# Defaults are those of transformers 5.23's configuration classes (tests/test_config.py compares).

_DEFAULTS: dict[str, Any] = dict(
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
)
_NO_WINDOW = dict(use_sliding_window=False, sliding_window=None, layer_types=None)
_ALL_ROPE = dict(no_rope_layers=None, no_rope_layer_interval=None)
_ALL_SPARSE: dict[str, Any] = dict(mlp_only_layers=None, decoder_sparse_step=1)

# model_type -> (what an absent field means, what holds whatever the file says).
_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
        _NO_WINDOW | _ALL_ROPE | dict(max_window_layers=0),
    ),
    "mistral": (
        dict(num_key_value_heads=8, max_position_embeddings=131072, bos_token_id=1, eos_token_id=2),
        # One window for all layers.
        _ALL_ROPE
        | dict(attention_bias=False, mlp_bias=False, use_sliding_window=True, max_window_layers=0),
    ),
    "qwen2": (
        dict(num_key_value_heads=32),
        _ALL_ROPE | dict(attention_bias=True, mlp_bias=False),
    ),
    "qwen3": (dict(num_key_value_heads=32, head_dim=128), _ALL_ROPE | dict(mlp_bias=False)),
    # Both have one window for all layers, or none.
    "mixtral": (
        dict(
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            sliding_window=None,
            bos_token_id=1,
            eos_token_id=2,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        _ALL_ROPE
        | _ALL_SPARSE
        | dict(attention_bias=False, mlp_bias=False, use_sliding_window=True, max_window_layers=0)
        | dict(layer_types=None, norm_topk_prob=True),
    ),
    "qwen3_moe": (
        dict(
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=False,
            moe_intermediate_size=768,
            **_ALL_SPARSE,
        ),
        _ALL_ROPE | dict(mlp_bias=False, max_window_layers=0, layer_types=None),
    ),
    "smollm3": (
        dict(
            num_key_value_heads=4,
            rope_theta=2e6,
            sliding_window=None,
            tie_word_embeddings=True,
            bos_token_id=128000,
            eos_token_id=128001,
            pad_token_id=128004,
        ),
        dict(max_window_layers=0),
    ),
}


def _check_family(model_type: Any) -> None:
    known = ", ".join(_FAMILIES)
    if model_type not in tuple(_FAMILIES):  # a tuple: the file may hold something unhashable
        raise ValueError(
            f"model_type is {_show(model_type)}, but fastlora knows {known}; "
            "is this a Llama-like language model?"
        )


# ── reading one field ─────────────────────────────────────────────────────────────────────


def _is_int(low: int, high: int = 2**31 - 1) -> Callable[[Any], bool]:
    return lambda x: type(x) is int and low <= x <= high  # type(): JSON's true is no 1


def _is_positive(x: Any) -> bool:
    # The bound keeps math.isfinite from overflowing on an integer of 400 digits.
    return type(x) in (int, float) and 0 < x < 2**63 and math.isfinite(x)


_EXPECTED: dict[str, Callable[[Any], bool]] = {
    "a positive integer": _is_int(1),
    "a positive integer or null": lambda x: x is None or _is_int(1)(x),
    "an integer from 1 to 10000": _is_int(1, 10_000),
    "an integer from 0 to 10000": _is_int(0, 10_000),
    "an integer, 0 or more": _is_int(0),
    "a positive number": _is_positive,
    "a positive number or null": lambda x: x is None or _is_positive(x),
    "true or false": lambda x: type(x) is bool,
}

# The fields that stand in the record as they stand in the file.
_PLAIN = dict(
    vocab_size="a positive integer",
    hidden_size="a positive integer",
    intermediate_size="a positive integer",
    num_hidden_layers="an integer from 1 to 10000",  # it sizes tuples: not to be believed blindly
    max_position_embeddings="a positive integer",
    rms_norm_eps="a positive number",
    tie_word_embeddings="true or false",
    attention_bias="true or false",
    mlp_bias="true or false",
)


class _Fields:
    """A JSON object, checked field by field as it is read; `problems` collects what is wrong."""

    def __init__(
        self, raw: dict[str, Any], prefix: str = "", problems: list[str] | None = None
    ) -> None:
        self.raw = raw
        self.prefix = prefix
        self.problems = [] if problems is None else problems

    def read(self, name: str, expected: str) -> Any:
        """The field's value, or None where it is not what was expected."""
        if name not in self.raw:
            self.problems.append(f"{self.prefix}{name} is missing; expected {expected}")
            return None
        value = self.raw[name]
        if not _EXPECTED[expected](value):
            self.problems.append(f"{self.prefix}{name} is {_show(value)}; expected {expected}")
            return None
        return float(value) if value is not None and "number" in expected else value

    def refuse_unsupported(self) -> None:
        """Settings that change what a model computes, to something fastlora does not compute."""
        if (act := self.raw["hidden_act"]) != "silu":
            self.problems.append(f"hidden_act is {_show(act)}; only 'silu' is supported")
        self.refuse_partial_rotary()
        if problem := _quantization_problem(self.raw.get("quantization_config")):
            self.problems.append(problem)

    def refuse_partial_rotary(self) -> None:
        if (factor := self.raw.get("partial_rotary_factor")) not in (None, 1):
            self.problems.append(
                f"{self.prefix}partial_rotary_factor is {_show(factor)}; only 1 is supported"
            )

    def dtype(self) -> str:
        """The config's dtype without torch's prefix; "float32" where the file gives none."""
        name = next((v for k in ("dtype", "torch_dtype") if (v := self.raw.get(k))), "float32")
        if isinstance(name, str) and (short := name.removeprefix("torch.")) in _DTYPES:
            return short
        self.problems.append(f"dtype is {_show(name)}; expected one of {', '.join(_DTYPES)}")
        return "float32"


_DTYPES = ("float32", "bfloat16", "float16", "float64")


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _quantization_problem(quantization: Any) -> str | None:
    """bitsandbytes' is read off the weights themselves; transformers' old files lack its name."""
    settings = quantization if isinstance(quantization, dict) else {}
    method = settings.get("quant_method")
    of_bitsandbytes = any(settings.get(key) is True for key in ("load_in_4bit", "load_in_8bit"))
    if quantization is None or (of_bitsandbytes and method in (None, "bitsandbytes")):
        return None
    if method == "bitsandbytes":
        return "quantization_config of bitsandbytes has neither load_in_4bit nor load_in_8bit"
    return f"quantization_config: quant_method {_show(method)} is not supported; 'bitsandbytes' is"


# ── what several fields say together ──────────────────────────────────────────────────────


def _attention_heads(settings: _Fields, read: dict[str, Any]) -> dict[str, Any]:
    """Head counts, head_dim and what goes with attention's projections."""
    hidden, problems = read["hidden_size"], settings.problems
    heads = settings.read("num_attention_heads", "a positive integer")
    kv_heads = settings.read("num_key_value_heads", "a positive integer or null") or heads
    head_dim = settings.read("head_dim", "a positive integer or null")
    if heads and kv_heads and heads % kv_heads:
        problems.append(
            f"num_attention_heads is {heads}; expected a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim is None and hidden and heads:
        if hidden % heads:
            problems.append(
                f"hidden_size is {hidden}; without a head_dim, expected a multiple of "
                f"num_attention_heads {heads}"
            )
        head_dim = hidden // heads
    if head_dim is not None and (head_dim % 2 or not head_dim):
        problems.append(f"head_dim is {head_dim}; RoPE rotates pairs, so it must be even")
    return dict(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attention_output_bias=read["attention_bias"] and settings.raw["model_type"] != "qwen2",
        qk_norm=settings.raw["model_type"] in ("qwen3", "qwen3_moe"),
    )


def _layers(settings: _Fields, n: int | None) -> dict[str, Any]:
    """Which layers rotate, and which see a window; `sliding_window` is None where none does."""
    window = settings.read("sliding_window", "a positive integer or null")
    if not settings.read("use_sliding_window", "true or false"):
        window = None
    first = settings.read("max_window_layers", "an integer, 0 or more")
    if n is None or first is None:
        return dict(layer_types=None, sliding_window=None, no_rope_layers=None)
    ropes = _no_rope_layers(settings, n)
    # SmolLM3 gives its window to the layers without RoPE, the others to the last ones.
    smollm3 = settings.raw["model_type"] == "smollm3"
    slides = [window and (not ropes[i] if smollm3 else i >= first) for i in range(n)]
    types = tuple("sliding_attention" if s else "full_attention" for s in slides)
    if (given := settings.raw["layer_types"]) is not None:
        types = _given_layer_types(settings, given, types, window)
    return dict(
        layer_types=types,
        sliding_window=window if "sliding_attention" in types else None,
        no_rope_layers=ropes,
    )


def _experts(settings: _Fields, n: int | None) -> dict[str, Any]:
    """The mixture's sizes, and which layers are one.

    `output_router_logits`, `router_aux_loss_coef` and `router_jitter_noise` are not read: they
    change nothing in the logits, and fastlora's loss is the cross-entropy alone.
    """
    raw = settings.raw
    experts = _expert_count(settings)
    if experts == 0 or n is None:
        none = dict(num_experts_per_tok=0, norm_topk_prob=False, moe_intermediate_size=0)
        return none | dict(num_local_experts=0, sparse_layers=(False,) * (n or 0))
    per_token = settings.read("num_experts_per_tok", "a positive integer")
    if experts and per_token and per_token > experts:
        settings.problems.append(
            f"num_experts_per_tok is {per_token}; expected at most the {experts} experts there are"
        )
    size = "intermediate_size" if raw["model_type"] == "mixtral" else "moe_intermediate_size"
    step = settings.read("decoder_sparse_step", "a positive integer") or 1
    dense = raw["mlp_only_layers"] or []
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        settings.problems.append(f"mlp_only_layers is {_show(dense)}; expected layer numbers")
        dense = []
    sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(n))
    if (total := (experts or 0) * sum(sparse)) > _MOST_EXPERTS:
        settings.problems.append(
            f"{experts} experts in each of {sum(sparse)} layers are {total:,}; expected at most"
            f" {_MOST_EXPERTS:,}"
        )
    return dict(
        num_local_experts=experts,
        num_experts_per_tok=per_token,
        norm_topk_prob=settings.read("norm_topk_prob", "true or false"),
        moe_intermediate_size=settings.read(size, "a positive integer"),
        sparse_layers=sparse,
    )


# They size lists of names. DeepSeek-V3 has 14,848.
_MOST_EXPERTS = 100_000


# Spellings of their number: transformers' alias of a class's own field wins over that.
_EXPERT_COUNTS = {
    "mixtral": ("num_experts", "num_local_experts"),
    "qwen3_moe": ("num_local_experts", "num_experts"),
}


def _expert_count(settings: _Fields) -> int | None:
    for name in _EXPERT_COUNTS.get(settings.raw["model_type"], ()):
        if name in settings.raw:
            return settings.read(name, "an integer from 0 to 10000")
    return 0


def _no_rope_layers(settings: _Fields, n: int) -> tuple[int, ...]:
    given = settings.raw["no_rope_layers"]
    if given is None:
        interval = settings.read("no_rope_layer_interval", "a positive integer or null")
        return tuple(int(interval is None or (i + 1) % interval != 0) for i in range(n))
    entries = given if isinstance(given, list) else []
    # transformers documents "at least" one entry per layer: the rest are not used.
    if len(entries) < n or any(type(x) is not int or x not in (0, 1) for x in entries):
        settings.problems.append(
            f"no_rope_layers is {_show(given)}; expected 0 or 1 for each of the {n} layers"
        )
        return (1,) * n
    return tuple(entries[:n])


def _given_layer_types(
    settings: _Fields, given: Any, derived: tuple[str, ...], window: int | None
) -> tuple[str, ...]:
    known, n = get_args(LayerType), len(derived)
    if not isinstance(given, list) or len(given) != n or any(t not in known for t in given):
        settings.problems.append(
            f"layer_types is {_show(given)}; expected {' or '.join(known)} for each of {n} layers"
        )
        return derived
    if "sliding_attention" in given and window is None:
        settings.problems.append(
            "layer_types has sliding_attention, but there is no window; "
            "expected sliding_window, and use_sliding_window true where the family has it"
        )
    if settings.raw["model_type"] == "mistral" and tuple(given) != derived:
        settings.problems.append(
            "layer_types differs between layers; in a mistral model sliding_window holds for all"
        )
    return tuple(given)


def _token_ids(
    raw: dict[str, Any], generation: dict[str, Any], defaults: dict[str, Any], problems: list[str]
) -> dict[str, Any]:
    """Special ids of both files; a negative id is Llama-1's spelling of none."""

    def ids(name: str) -> list[int]:
        sources = [d for d in (raw, generation) if name in d] or [defaults]
        values: list[Any] = []
        for value in (d.get(name) for d in sources):
            values += value if isinstance(value, list) else [value]
        if any(v is not None and not _is_int(-(2**31))(v) for v in values):
            problems.append(f"{name} is {_show(values)}; expected token ids or null")
            return []
        return [v for v in dict.fromkeys(values) if v is not None and v >= 0]

    return dict(
        bos_token_id=next(iter(ids("bos_token_id")), None),
        eos_token_id=tuple(ids("eos_token_id")),
        pad_token_id=next(iter(ids("pad_token_id")), None),
    )


# ── RoPE ──────────────────────────────────────────────────────────────────────────────────

_ROPE_PLAIN = dict(
    factor="a positive number",
    original_max_position_embeddings="a positive integer",
    low_freq_factor="a positive number",
    high_freq_factor="a positive number",
    attention_factor="a positive number or null",
    beta_fast="a positive number",
    beta_slow="a positive number",
    mscale="a positive number or null",
    mscale_all_dim="a positive number or null",
    truncate="true or false",
)
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def _rope_parameters(settings: _Fields, model: dict[str, Any]) -> RopeParameters | None:
    """Old and new spelling, resolved as transformers 5.23 does (modeling_rope_utils.py:775-866).

    An old `rope_scaling` wins over `rope_parameters` whole; its theta is then the top level's.
    """
    raw, problems, max_positions = settings.raw, settings.problems, model["max_position_embeddings"]
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict):
        problems.append(f"rope_parameters is {_show(given)}; expected an object")
        return None
    if nested := [t for t in get_args(LayerType) if t in given]:
        problems.append(f"rope_parameters has {nested}: RoPE per layer type is not supported")
        return None
    rope = _Fields({"rope_theta": raw["rope_theta"], **given}, "rope_parameters.", problems)
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in get_args(RopeType):
        known = ", ".join(_ROPE_FIELDS)
        problems.append(f"rope_type is {_show(rope_type)}; expected one of {known}")
        return None
    rope.refuse_partial_rotary()
    _fill_rope_defaults(
        rope.raw, rope_type, raw.get("original_max_position_embeddings"), max_positions
    )
    read = {name: rope.read(name, _ROPE_PLAIN[name]) for name in _ROPE_FIELDS[rope_type]}
    theta = rope.read("rope_theta", "a positive number")
    _check_rope_order(read, problems)
    if rope_type == "yarn" and theta == 1:
        problems.append("rope_parameters.rope_theta is 1; YaRN divides by its logarithm, 0")
    if rope_type == "dynamic" and model["head_dim"] == 2:
        problems.append("head_dim is 2; dynamic RoPE divides by head_dim - 2, so expected more")
    if problems:
        return None
    return RopeParameters(rope_type=rope_type, rope_theta=theta, **read)


def _fill_rope_defaults(
    rope: dict[str, Any], rope_type: str, original: Any, max_positions: int | None
) -> None:
    if original is not None:
        rope["original_max_position_embeddings"] = original
    rope.setdefault("original_max_position_embeddings", max_positions)
    if rope_type != "yarn":
        return
    original = rope["original_max_position_embeddings"]
    if "factor" in rope and rope["factor"] is None and max_positions and _is_int(1)(original):
        rope["factor"] = max_positions / original
    # Null and 0 both mean the default (betas), or that both mscales are unused.
    rope["beta_fast"] = rope.get("beta_fast") or 32.0
    rope["beta_slow"] = rope.get("beta_slow") or 1.0
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    rope["mscale"], rope["mscale_all_dim"] = (
        (rope["mscale"], rope["mscale_all_dim"]) if both else (None, None)
    )
    rope.setdefault("attention_factor", None)
    rope.setdefault("truncate", True)


def _check_rope_order(read: dict[str, Any], problems: list[str]) -> None:
    low, high = read.get("low_freq_factor"), read.get("high_freq_factor")
    if low and high and high <= low:
        problems.append(
            f"rope_parameters.high_freq_factor is {high}; expected more than low_freq_factor {low}"
        )


def _with_rope_scaling(raw: dict[str, Any], rope_scaling: dict[str, Any]) -> dict[str, Any]:
    """config.json with the user's RoPE in it, in the old spelling, which every version reads."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = given.get("rope_theta") if isinstance(given, dict) else None
    kept = {k: v for k, v in raw.items() if k != "rope_parameters"}
    if "original_max_position_embeddings" in rope_scaling:
        kept.pop("original_max_position_embeddings", None)  # at top level it would win
    if theta is not None:
        kept["rope_theta"] = theta
    return kept | {"rope_scaling": dict(rope_scaling)}
