"""Wrapper: a checkpoint with a vision tower whose text model is one of `FAMILIES`.

fastlora reads the text model alone. Its tensors have the text family's names in the trees; names in
files have the wrapper's prefix (models/wrapped_names.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """One kind of such checkpoints. The fields use the names of config.json."""

    name: str  # config.json's model_type
    # model_type of text_config -> transformers' class for the text model alone. The first one is
    # meant if text_config has no model_type.
    texts: Mapping[str, str]
    defaults: Mapping[str, Any]  # meanings of fields that text_config lacks
    # Values that replace those of text_config, because the wrapper's model does not read them.
    fixed: Mapping[str, Any]
