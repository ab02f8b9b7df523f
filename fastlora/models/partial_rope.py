"""RoPE of a part of each head, and names of RoPE's types that only some families use."""

from typing import Any

from fastlora.models.families.family import Family
from fastlora.models.json_fields import Fields, show


def common_rope(raw: dict[str, Any], family: Family) -> tuple[dict[str, Any], Any]:
    """(raw with RoPE's settings as other families have them, its partial_rotary_factor).

    Families that do not read the factor, and have no names of their own, keep their settings.
    """
    if not (family.partial_rotary or family.rope_type_names):
        return raw, 1.0
    common = {k: v for k, v in raw.items() if k != "partial_rotary_factor"}
    factor = raw.get("partial_rotary_factor", 1.0)
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    if isinstance(rope := raw.get(key), dict):
        factor = rope.get("partial_rotary_factor", factor)
        rope = {k: v for k, v in rope.items() if k != "partial_rotary_factor"}
        for name in ("type", "rope_type"):
            if isinstance(rope.get(name), str):
                rope[name] = dict(family.rope_type_names).get(rope[name], rope[name])
        common[key] = rope
    return common, factor


def rope_dim(settings: Fields, head_dim: int | None, factor: Any) -> int | None:
    """How many dimensions of each head are rotated."""
    if type(factor) not in (int, float) or not 0 < factor <= 1:
        settings.problems.append(
            f"partial_rotary_factor is {show(factor)}; expected a number in (0, 1]"
        )
        return None
    dim = None if head_dim is None else int(head_dim * factor)
    if dim is not None and (dim % 2 or not dim) and factor != 1:
        settings.problems.append(
            f"partial_rotary_factor is {factor}: RoPE would rotate {dim} of {head_dim} dimensions;"
            " expected an even number"
        )
    return dim
