"""RoPE settings of a config.json, in the old and the new spelling -> RopeParameters."""

from typing import Any, get_args

from fastlora.models.config import LayerType, RopeParameters, RopeType
from fastlora.models.families.family import SlidingRope
from fastlora.models.json_fields import Fields, is_int, show

_EXPECTED = dict(
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
    short_factor="a list of positive numbers",
    long_factor="a list of positive numbers",
)

# rope_type -> the fields that it reads, besides rope_theta.
_FIELDS_OF_TYPE: dict[str, tuple[str, ...]] = {
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
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
}


def rope_parameters(
    settings: Fields, model: dict[str, Any], sliding: SlidingRope | None = None
) -> tuple[RopeParameters | None, RopeParameters | None]:
    """(RoPE of full layers, RoPE of sliding layers).

    Both spellings are read as transformers 5.23 reads them (modeling_rope_utils.py:775-866; with
    `sliding`, Gemma3TextConfig.convert_rope_params_to_dict).

    If a file has `rope_scaling`, its `rope_parameters` is ignored, and theta is the top-level
    `rope_theta`.

    Args:
        settings: the whole config.json, with defaults.
        model: fields read so far; "max_position_embeddings" and "rope_dim" are used.
        sliding: how the family spells RoPE of sliding layers; None: it is that of full layers.

    Returns:
        None for each if any field so far is wrong; `settings.problems` then says which.
    """
    raw, problems = settings.raw, settings.problems
    old, given = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if sliding is None:
        given, old = old or given, {}
    if wrong := [x for x in (old, given) if not isinstance(x, dict)]:
        problems.append(f"rope_parameters is {show(wrong[0])}; expected an object")
        return None, None
    nested = [t for t in get_args(LayerType) if t in given]
    if nested and sliding is None:
        problems.append(f"rope_parameters has {nested}: RoPE per layer type is not supported")
        return None, None
    if sliding is None:
        both = _parameters(settings, model, given, raw["rope_theta"], "rope_parameters.")
        return both, both
    if given and not nested:
        problems.append(
            f"rope_parameters is {show(given)}; expected full_attention and sliding_attention"
        )
        return None, None
    full, other = ((given.get(t) or {}) for t in ("full_attention", "sliding_attention"))
    if wrong := [x for x in (full, other) if not isinstance(x, dict)]:
        problems.append(f"rope_parameters has {show(wrong[0])}; expected objects")
        return None, None
    theta = sliding.theta if sliding.field is None else raw.get(sliding.field, sliding.theta)
    prefix = "rope_parameters.{}.".format
    of_full = _parameters(
        settings, model, {**full, **old}, raw["rope_theta"], prefix("full_attention")
    )
    of_sliding = _parameters(settings, model, other, theta, prefix("sliding_attention"))
    return of_full, of_sliding


def _parameters(
    settings: Fields, model: dict[str, Any], given: dict[str, Any], theta: Any, prefix: str
) -> RopeParameters | None:
    """RopeParameters from one object of config.json; None if any field so far is wrong.

    `theta` counts if the object has none: older files have it at top level.
    """
    raw, problems, max_positions = settings.raw, settings.problems, model["max_position_embeddings"]
    rope = Fields({"rope_theta": theta, **given}, prefix, problems)
    # Old files say "type". If a file says both, transformers reads rope_type.
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in get_args(RopeType):
        known = ", ".join(_FIELDS_OF_TYPE)
        problems.append(f"rope_type is {show(rope_type)}; expected one of {known}")
        return None
    rope.refuse_partial_rotary()
    _fill_rope_defaults(
        rope.raw, rope_type, raw.get("original_max_position_embeddings"), max_positions
    )
    read = {name: rope.read(name, _EXPECTED[name]) for name in _FIELDS_OF_TYPE[rope_type]}
    theta = rope.read("rope_theta", "a positive number")
    _check_frequency_order(read, problems)
    problems += _division_problems(rope_type, theta, read, model["rope_dim"] or 0)
    # A problem of any field, not only of RoPE's: the values above may be None then.
    if problems:
        return None
    return RopeParameters(rope_type=rope_type, rope_theta=theta, **read)


def _division_problems(
    rope_type: str, theta: float | None, read: dict[str, Any], rope_dim: int
) -> list[str]:
    """Values with which a formula would divide by 0, and lists of a wrong length."""
    problems = []
    if rope_type == "yarn" and theta == 1:
        problems.append("rope_parameters.rope_theta is 1; YaRN divides by its logarithm, 0")
    if rope_type == "dynamic" and rope_dim == 2:
        problems.append("head_dim is 2; dynamic RoPE divides by head_dim - 2, so expected more")
    if rope_type == "longrope" and read["original_max_position_embeddings"] == 1:
        problems.append(
            "original_max_position_embeddings is 1; LongRoPE divides by its logarithm, 0"
        )
    return problems + [
        f"rope_parameters.{name} has {len(read[name])} numbers; expected one for each of the"
        f" {rope_dim // 2} pairs of dimensions that RoPE rotates"
        for name in ("short_factor", "long_factor")
        if read.get(name) is not None and len(read[name]) != rope_dim // 2
    ]


def rope_scaling_problems(rope_scaling: dict[str, Any]) -> list[str]:
    """Keys of a user's RoPE settings that its rope_type does not read, misspelt ones for example.

    A file may have such keys, because transformers ignores them with a warning.
    """
    rope_type = rope_scaling.get("rope_type", rope_scaling.get("type", "default"))
    if rope_type not in get_args(RopeType):
        return []  # `rope_parameters` reports it
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    # Files have it beside every type.
    read = dict.fromkeys((*_FIELDS_OF_TYPE[rope_type], "original_max_position_embeddings"))
    return [
        f"rope_scaling has {show(key)}, which rope_type {rope_type!r} does not read; it reads"
        f" rope_theta, {', '.join(read)}"
        for key in rope_scaling
        if key not in read and key not in known
    ]


def _fill_rope_defaults(
    rope: dict[str, Any], rope_type: str, original: Any, max_positions: int | None
) -> None:
    if original is not None:  # a top-level value wins over the one inside the object
        rope["original_max_position_embeddings"] = original
    rope.setdefault("original_max_position_embeddings", max_positions)
    if rope_type not in ("yarn", "longrope"):
        return
    rope.setdefault("attention_factor", None)
    if rope_type == "longrope":
        rope.setdefault("factor", None)
    original = rope["original_max_position_embeddings"]
    if "factor" in rope and rope["factor"] is None and max_positions and is_int(1)(original):
        rope["factor"] = max_positions / original
    if rope_type == "longrope":
        return
    # Null and 0 both mean the default for the betas. One mscale without the other is not used.
    rope["beta_fast"] = rope.get("beta_fast") or 32.0
    rope["beta_slow"] = rope.get("beta_slow") or 1.0
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    rope["mscale"], rope["mscale_all_dim"] = (
        (rope["mscale"], rope["mscale_all_dim"]) if both else (None, None)
    )
    rope.setdefault("truncate", True)


def _check_frequency_order(read: dict[str, Any], problems: list[str]) -> None:
    low, high = read.get("low_freq_factor"), read.get("high_freq_factor")
    if low and high and high <= low:
        problems.append(
            f"rope_parameters.high_freq_factor is {high}; expected more than low_freq_factor {low}"
        )


def with_rope_scaling(raw: dict[str, Any], rope_scaling: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the user's RoPE settings, in the old spelling.

    Every version of transformers reads the old spelling. Drawn for a file in the new one:

        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, ...}
        -> {"rope_theta": 5e5, "rope_scaling": rope_scaling, ...}

    A file with RoPE by layer type keeps the new spelling. The settings are those of full layers.
    """
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if isinstance(given, dict) and isinstance(full := given.get("full_attention"), dict):
        kept = {k: v for k, v in full.items() if k == "rope_theta"}
        return raw | {"rope_parameters": given | {"full_attention": kept | rope_scaling}}
    theta = given.get("rope_theta") if isinstance(given, dict) else None
    kept = {k: v for k, v in raw.items() if k != "rope_parameters"}
    if "original_max_position_embeddings" in rope_scaling:
        kept.pop("original_max_position_embeddings", None)  # at top level it would win
    if theta is not None:
        kept["rope_theta"] = theta
    return kept | {"rope_scaling": dict(rope_scaling)}
