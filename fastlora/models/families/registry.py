"""FAMILIES: every family that fastlora runs, by config.json's model_type; WRAPPERS: the checkpoints
that hold one beside a vision tower."""

from typing import Any

from fastlora.models.config import LlamaConfig
from fastlora.models.families.cwm import CWM
from fastlora.models.families.ernie4_5 import ERNIE4_5
from fastlora.models.families.family import DECLARED_CLASS, Family, TokenizerClass
from fastlora.models.families.gemma2 import GEMMA2
from fastlora.models.families.gemma3 import GEMMA3, GEMMA3_TEXT
from fastlora.models.families.granite import GRANITE
from fastlora.models.families.granite4 import GRANITE4
from fastlora.models.families.helium import HELIUM
from fastlora.models.families.internlm3 import INTERNLM3
from fastlora.models.families.llama import LLAMA
from fastlora.models.families.ministral import MINISTRAL
from fastlora.models.families.mistral import MISTRAL
from fastlora.models.families.mistral3 import MISTRAL3
from fastlora.models.families.mixtral import MIXTRAL
from fastlora.models.families.olmo2 import OLMO2
from fastlora.models.families.olmo3 import OLMO3
from fastlora.models.families.phi3 import PHI3
from fastlora.models.families.qwen2 import QWEN2
from fastlora.models.families.qwen3 import QWEN3
from fastlora.models.families.qwen3_moe import QWEN3_MOE
from fastlora.models.families.seed_oss import SEED_OSS
from fastlora.models.families.smollm3 import SMOLLM3
from fastlora.models.families.wrapper import Wrapper

# In the order in which error messages list them.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        MIXTRAL,
        QWEN3_MOE,
        SMOLLM3,
        OLMO2,
        OLMO3,
        GEMMA2,
        GEMMA3_TEXT,
        MINISTRAL,
        INTERNLM3,
        SEED_OSS,
        CWM,
        ERNIE4_5,
        HELIUM,
        GRANITE,
        GRANITE4,
        PHI3,
    )
}

WRAPPERS: dict[str, Wrapper] = {wrapper.name: wrapper for wrapper in (GEMMA3, MISTRAL3)}

# Families whose tokenizers are read although their models are not.
_TOKENIZERS_ONLY = {"qwen2_moe": QWEN3.tokenizer_class}


def family_of(config: LlamaConfig) -> Family:
    """The record of the family that a model belongs to."""
    return FAMILIES[config.model_type]


def tokenizer_class_of(model_type: Any) -> TokenizerClass:
    """The tokenizer class that transformers builds beside a config.json of this model_type.

    Args:
        model_type: as a file gives it. An unknown or malformed one means: no particular class.
    """
    if not isinstance(model_type, str):
        return DECLARED_CLASS
    if (wrapper := WRAPPERS.get(model_type)) is not None:
        model_type = next(iter(wrapper.texts))
    family = FAMILIES.get(model_type)
    if family is not None:
        return family.tokenizer_class
    return _TOKENIZERS_ONLY.get(model_type, DECLARED_CLASS)
