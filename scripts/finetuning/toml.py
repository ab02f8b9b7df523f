"""to_toml(): options as TOML, which --config reads back."""

import dataclasses
import json
from pathlib import Path
from typing import Any


def to_toml(options: Any) -> str:
    """One line for each option. TOML has no null, so options that are None are comments."""
    lines = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        unset = value is None or field.name in ("config", "repeat")
        lines.append(f"# {field.name}" if unset else f"{field.name} = {_value(value)}")
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        pairs = [f"{json.dumps(str(k))} = {_value(v)}" for k, v in value.items()]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    # JSON's texts, numbers and booleans are TOML's.
    return json.dumps(str(value) if isinstance(value, Path) else value)
