"""LoRA fine-tuning of Llama-family models as a functional PyTorch library.

A run, from a checkpoint to an adapter on disk:

    model, tokenizer = fastlora.load("meta-llama/Llama-3.2-1B-Instruct", load_in_4bit=True)
    model = fastlora.lora(model, r=16)                             # attach an adapter
    print(fastlora.plan(model, batch_size=8, seq_length=2048))     # does it fit this GPU?
    model, history = fastlora.train(model, tokenizer, "train.jsonl", output_dir="runs/first")
    print(model.generate_text(tokenizer, "What is a rank?"))
    model.save_pretrained("adapter")                               # PEFT reads this folder

`Model` and `Tokenizer` are immutable: every function returns a new one. Between `load` and `train`,
`add_tokens` extends the vocabulary and `initialize` sets the adapter from data. `load_adapter`
reads an adapter; `combine`, `disable`, `merge` and `quantize` make another model of one.
`find_learning_rate` tries rates before a run. `gathered` makes a sharded base whole.
`context_group` names the ranks that have rows together.
`generate_many` continues many prompts, which join a running batch as others end.
`functional` and `value_and_grad` are the pure functions below these: adapter first, for torch.func.
`losses` holds dpo, orpo, kto, simpo, dft, distill and grpo, and the records for `train(loss=...)`.
`research` holds Hessians, posteriors and influence of examples over an adapter.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlora import functional, losses, research
    from fastlora.adapters.create import lora
    from fastlora.adapters.edits.combining import combine, disable
    from fastlora.adapters.edits.merging import merge
    from fastlora.adapters.edits.quantization import quantize
    from fastlora.adapters.edits.vocabulary import add_tokens
    from fastlora.adapters.init_from_data.dispatch import initialize
    from fastlora.distributed.context_parallel import context_group
    from fastlora.distributed.sharded_base import gathered
    from fastlora.errors import CheckpointError
    from fastlora.formats.peft.reading import load_adapter
    from fastlora.generation.many import generate_many
    from fastlora.loading import load
    from fastlora.model import Model
    from fastlora.runtime.gradients import value_and_grad
    from fastlora.runtime.per_example import Sketch
    from fastlora.text.tokenizer import Tokenizer
    from fastlora.training.history import History
    from fastlora.training.loop import train
    from fastlora.training.planning.plan import plan
    from fastlora.training.rate_range import RateRange, find_learning_rate

__version__ = "0.1.0"

# Public name -> the module that defines it. A module is imported when its name is first used:
# processes that encode rows import parts of fastlora without torch, which takes a second to import.
_HOMES = {
    "CheckpointError": "fastlora.errors",
    "History": "fastlora.training.history",
    "Model": "fastlora.model",
    "RateRange": "fastlora.training.rate_range",
    "Sketch": "fastlora.runtime.per_example",
    "Tokenizer": "fastlora.text.tokenizer",
    "add_tokens": "fastlora.adapters.edits.vocabulary",
    "combine": "fastlora.adapters.edits.combining",
    "context_group": "fastlora.distributed.context_parallel",
    "disable": "fastlora.adapters.edits.combining",
    "find_learning_rate": "fastlora.training.rate_range",
    "gathered": "fastlora.distributed.sharded_base",
    "generate_many": "fastlora.generation.many",
    "initialize": "fastlora.adapters.init_from_data.dispatch",
    "load": "fastlora.loading",
    "load_adapter": "fastlora.formats.peft.reading",
    "lora": "fastlora.adapters.create",
    "merge": "fastlora.adapters.edits.merging",
    "plan": "fastlora.training.planning.plan",
    "quantize": "fastlora.adapters.edits.quantization",
    "train": "fastlora.training.loop",
    "value_and_grad": "fastlora.runtime.gradients",
}
_MODULES = ("functional", "losses", "research")

__all__ = [
    "CheckpointError",
    "History",
    "Model",
    "RateRange",
    "Sketch",
    "Tokenizer",
    "add_tokens",
    "combine",
    "context_group",
    "disable",
    "find_learning_rate",
    "functional",
    "gathered",
    "generate_many",
    "initialize",
    "load",
    "load_adapter",
    "lora",
    "losses",
    "merge",
    "plan",
    "quantize",
    "research",
    "train",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"fastlora.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
