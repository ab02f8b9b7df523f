"""Models under test: a checkpoint that both libraries read, and adapters with random values."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

import fastlora
from fastlora.model import Model
from oracles.checkpoints import make_checkpoint
from oracles.trees import randomised


class Pair(NamedTuple):
    """One checkpoint, read by both sides."""

    folder: Path
    model: Model
    oracle: PreTrainedModel

    def fresh_oracle(self) -> PreTrainedModel:
        """A copy, because dynamic RoPE remembers the longest input so far."""
        return copy.deepcopy(self.oracle)

    @torch.no_grad()
    def theirs(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """transformers' logits."""
        return self.fresh_oracle()(input_ids, **inputs).logits


def read_pair(family: str, folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Pair:
    """Write a checkpoint of a family, and read it with transformers and with fastlora.

    128 tokens are allowed, beyond dynamic RoPE's trained 16.
    """
    oracle = make_checkpoint(family, folder, dtype, config=config)
    model, _ = fastlora.load(folder, max_seq_length=128, device="cpu")
    return Pair(folder, model, oracle)


def read_tiny(folder: Path, **config: Any) -> Model:
    sizes = dict(vocab_size=24, hidden_size=16, intermediate_size=20)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    make_checkpoint("llama2", folder, config=sizes | heads | config)
    model, _ = fastlora.load(folder, dtype="float64", device="cpu")
    return adapted(model, r=2, lora_dropout=0.2)


def adapted(model: Model, seed: int = 0, **settings: Any) -> Model:
    """The model with LoRA whose A and B are both random, in the base's dtype or wider."""
    model = fastlora.lora(model, **settings)
    wide = torch.promote_types(model.base["norm"].dtype, torch.float32)
    return model.with_adapter(randomised(tree_map(lambda x: x.to(wide), model.adapter), seed))
