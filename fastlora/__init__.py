"""LoRA fine-tuning of Llama-family models as a functional PyTorch library."""

from fastlora import functional
from fastlora.adapter import lora
from fastlora.checks import CheckpointError
from fastlora.combine import combine, disable
from fastlora.export import load_adapter
from fastlora.gradients import value_and_grad
from fastlora.initialize import initialize
from fastlora.loading import load
from fastlora.merging import merge
from fastlora.model import Model
from fastlora.planning import plan
from fastlora.quantization import quantize
from fastlora.tokenizer import Tokenizer
from fastlora.training import History, train
from fastlora.vocabulary import add_tokens

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
