"""config.json of a checkpoint with a vision tower -> that of its text model alone."""

from typing import Any

from fastlora.models.families.registry import WRAPPERS
from fastlora.models.families.wrapper import Wrapper
from fastlora.models.json_fields import show


def wrapper_of(raw: dict[str, Any]) -> Wrapper | None:
    """The record of a config.json's model_type, if it is that of a wrapper."""
    model_type = raw.get("model_type")
    return WRAPPERS.get(model_type) if isinstance(model_type, str) else None


# Fields that a file with a text_config has beside it, and that mean the text model too.
_OUTER_FIELDS = (
    *("dtype", "torch_dtype", "quantization_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def text_json(raw: dict[str, Any], wrapper: Wrapper) -> dict[str, Any]:
    """config.json of the text model alone, from that of a checkpoint with a vision tower.

    Raises:
        ValueError: text_config is not an object, or its model is not one that fastlora reads.
    """
    text, known = raw.get("text_config", {}), list(wrapper.texts)
    if not isinstance(text, dict):
        raise ValueError(f"text_config is {show(text)}; expected an object")
    model_type = text.get("model_type", known[0])
    if not isinstance(model_type, str) or model_type not in known:
        raise ValueError(
            f"text_config of {wrapper.name!r} has model_type {show(model_type)}, but fastlora knows"
            f" {', '.join(known)}"
        )
    outer = {name: raw[name] for name in _OUTER_FIELDS if raw.get(name) is not None}
    return {
        **wrapper.defaults,
        **text,
        **outer,
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
        "model_type": model_type,
        "architectures": [wrapper.texts[model_type]],
        **wrapper.fixed,
    }
