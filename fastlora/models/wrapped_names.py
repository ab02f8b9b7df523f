"""Names of tensors and modules of a text model inside a checkpoint with a vision tower.

    in the trees        in transformers 5 and PEFT          in files
    model.layers.0...   model.language_model.layers.0...    language_model.model.layers.0...
    lm_head.weight      lm_head.weight                      language_model.lm_head.weight

Files of any age are read: transformers 5 writes the names of files, and its own.
"""

# Of a module of the text model, in transformers 5 and in PEFT's keys.
_INSIDE = "model.language_model"

# Prefixes of the parts that fastlora does not have.
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "vision_model.")

# A regular expression for the modules of the other parts, by their names in transformers 5.
OTHER_MODULES = r".*\b(vision_tower|multi_modal_projector)\b.*"


def wrapped_name(name: str) -> str:
    """The name in transformers 5 of a module or tensor that the trees call `name`."""
    first, _, rest = name.partition(".")
    if first != "model":
        return name
    return f"{_INSIDE}.{rest}" if rest else _INSIDE


def text_name(key: str) -> str | None:
    """The name in the trees of a tensor of a file; None if it belongs to another part."""
    plain = key.removeprefix("model.")
    if plain.startswith(_OTHER_PARTS):
        return None
    if not plain.startswith("language_model."):
        return key
    inner = plain.removeprefix("language_model.")
    return inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}"
