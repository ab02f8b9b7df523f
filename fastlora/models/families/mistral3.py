"""Mistral Small 3.1 and 3.2: Mistral's text model beside Pixtral's vision tower.

Ministral 3, which has the same model_type, has another text model (`ministral3`).
"""

from fastlora.models.families.wrapper import Wrapper

MISTRAL3 = Wrapper(
    name="mistral3",
    texts={"mistral": "MistralForCausalLM"},
    # transformers' Mistral3Config has these for a file without any text_config.
    defaults={},
    fixed={},
)
