"""LoRA fine-tuning of Llama-family models as a functional PyTorch library."""

from fastlora import functional
from fastlora.adapters.create import lora
from fastlora.adapters.edits.combining import combine, disable
from fastlora.adapters.edits.merging import merge
from fastlora.adapters.edits.quantization import quantize
from fastlora.adapters.edits.vocabulary import add_tokens
from fastlora.adapters.init_from_data.dispatch import initialize
from fastlora.errors import CheckpointError
from fastlora.formats.peft.reading import load_adapter
from fastlora.loading import load
from fastlora.model import Model
from fastlora.runtime.gradients import value_and_grad
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.history import History
from fastlora.training.loop import train
from fastlora.training.planning.plan import plan

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "History",
    "Model",
    "Tokenizer",
    "add_tokens",
    "combine",
    "disable",
    "functional",
    "initialize",
    "load",
    "load_adapter",
    "lora",
    "merge",
    "plan",
    "quantize",
    "train",
    "value_and_grad",
]
