"""Random bases in the shape of real models, made on the device, whole or sharded."""

from dataclasses import replace
from typing import Any

import torch
from random_checkpoint import SHAPES, _shape

import fastlora
from fastlora.distributed.gathered_bytes import Gathers
from fastlora.distributed.mesh import SHARD_DIMENSIONS, group_mesh, shards_for
from fastlora.distributed.sharded_base import shard_layers, shard_matrix
from fastlora.model import Model
from fastlora.models.config import LlamaConfig
from fastlora.models.config_json import config_from_json
from fastlora.models.fused_qkv import fuse_qkv
from fastlora.models.names import base_tensors, layer_from_tensors, layer_tensors
from fastlora.models.params import PROJECTIONS
from fastlora.models.spec import Spec
from fastlora.ops.quant.bitsandbytes import quantize_4bit

TINY = _shape(64, 176, 4, 4, 16, False, 8.0) | dict(vocab_size=512, num_key_value_heads=2)
ALL: dict[str, dict[str, Any]] = SHAPES | {
    "tiny": TINY,
    "70b": _shape(8192, 28672, 80, 64, 128, False, 8.0),
}


def config_of(shape: str, layers: int | None) -> LlamaConfig:
    """The shape's config, with another number of layers if that is given."""
    raw = ALL[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    return config_from_json(raw)


class Draws:
    """The tensors of a model, drawn one by one; a tensor's values depend on its number only."""

    def __init__(self, config: LlamaConfig, device: torch.device, nf4: bool) -> None:
        """Nothing is drawn yet."""
        self.config, self.device, self.nf4 = config, device, nf4
        self.shapes = base_tensors(config)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def tensor(self, name: str, number: int) -> torch.Tensor:
        """A matrix from N(0, 0.02²), or a norm of ones."""
        shape = self.shapes[name]
        how: dict[str, Any] = dict(dtype=self.dtype, device=self.device)
        if len(shape) == 1:
            return torch.ones(shape, **how)
        generator = torch.Generator(self.device).manual_seed(number)
        return torch.empty(shape, **how).normal_(0, 0.02, generator=generator)

    def layer(self, i: int) -> Any:
        """The tree of a layer, as `load` has it on this device."""
        names = [name for name, _ in layer_tensors(self.config, i).values()]
        tensors: dict[str, Any] = {n: self.tensor(n, 100 * i + k) for k, n in enumerate(names)}
        if self.nf4:
            is_projection = lambda name: name.split(".")[-2] in PROJECTIONS
            quantized = {n: quantize_4bit(x) for n, x in tensors.items() if is_projection(n)}
            tensors |= quantized
        elif self.device.type == "cuda":
            tensors = _fused(self.config, i, tensors)
        return layer_from_tensors(self.config, i, tensors.__getitem__)

    def edges(self) -> dict[str, torch.Tensor]:
        """Embedding, and head unless it is tied."""
        names = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
        found = {key: name for key, name in names.items() if name in self.shapes}
        return {key: self.tensor(name, 7 + k) for k, (key, name) in enumerate(found.items())}


def model_of(draws: Draws, shard: Any, recompute: Any, nccl: bool = False) -> Model:
    """A model with r = 16 on all projections. Of a sharded base, a rank makes one layer at a time
    and keeps its part; `shard` and `recompute` are arguments of `load` and of `lora`. A single rank
    gathers its own bytes, which shows the cost of that path. With `nccl` bytes are gathered by
    NCCL, also where GPUs could read each other's memory."""
    config = draws.config
    base: dict[str, Any] = {"norm": draws.tensor("model.norm.weight", 0)}
    if shard is None:
        base["layers"] = tuple(draws.layer(i) for i in range(config.num_hidden_layers))
        base |= draws.edges()
    else:
        shard = group_mesh(1, draws.device, SHARD_DIMENSIONS) if shard == 1 else shard
        shards = shards_for(shard, draws.device, base_bytes=0)  # the size matters to "auto" alone
        if nccl:
            shards.source = Gathers(shards.group, draws.device)
        base["layers"] = shard_layers(shards, config.num_hidden_layers, draws.layer)
        base |= {key: shard_matrix(shards, key, x) for key, x in draws.edges().items()}
    spec = Spec(config=config, name_or_path="random", max_seq_length=config.max_position_embeddings)
    model: Any = Model(spec=spec, base=base)  # pyright: ignore[reportArgumentType]
    return fastlora.lora(model, r=16, recompute=recompute)


def _fused(config: LlamaConfig, i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    """q, k and v side by side."""
    rename = lambda name, a, b: name.replace(f".layers.{a}.", f".layers.{b}.")
    first = {rename(name, i, 0): x for name, x in tensors.items()}
    fuse_qkv(replace(config, num_hidden_layers=1), first)
    return {rename(name, 0, i): x for name, x in first.items()}
