"""save_mlx_adapter(): a LoRA adapter in mlx-lm's layout, for Apple's machines.

adapters.safetensors   "model.layers.3.self_attn.q_proj.lora_a" [d_in, r], "....lora_b" [r, d_out]
adapter_config.json    one rank, one scale, and the modules that have LoRA in every layer

mlx-lm computes W x + scale * ((x A) B). Matrices are transposed here, ranks padded with zeros to
the largest, and scalings folded into B. A module that only some layers adapt gets zeros in the
others. Experts keep [e, r, d_in] and [e, d_out, r].

Source: mlx_lm/tuner/utils.py (linear_to_lora_layers, load_adapters) and tuner/lora.py of
ml-explore/mlx-lm@036728670ef951c1d583689ad2255020702dcfa3.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.adapters.edits.merging import merge_problem
from fastlora.arguments import PATH, check_arguments
from fastlora.checkpoints.output_folders import MODEL_FILES, other_model_error, writable_folder
from fastlora.checkpoints.tensors import write_json, write_safetensors
from fastlora.errors import raise_problems
from fastlora.formats.gguf.adapter_file import adapter_problems
from fastlora.formats.gguf.output import check_adapter_tensors
from fastlora.formats.peft.writing import CONFIG_FILE, MLX_WEIGHTS
from fastlora.models.config import LlamaConfig
from fastlora.models.names import (
    expert_matrices,
    expert_spelling,
    layer_targets,
    projection_path,
    target_shape,
)
from fastlora.models.params import EXPERTS, ROUTER, Adapter
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import LoraConfig
from fastlora.models.stacks import check_one_adapter
from fastlora.models.state import ModelState, require_adapter

_MATRICES = ("gate_proj", "up_proj", "down_proj")


class _Pair(NamedTuple):
    """A and B of one module, with the scaling in B."""

    a: Tensor
    b: Tensor


def save_mlx_adapter(model: ModelState, folder: str | os.PathLike[str]) -> None:
    """Write a folder that `mlx_lm.generate --adapter-path FOLDER` reads, in float32.

    Args:
        model: with an adapter.
        folder: created if it does not exist.

    Raises:
        ValueError: before any file is written, if the model has no adapter, its base is not the
            checkpoint's, the format cannot hold the adapter, the adapter holds NaN or infinity, or
            the folder holds a model or an adapter in PEFT's format.
        PermissionError: the folder cannot be written to.
    """
    check_arguments("save_mlx_adapter", folder=(folder, PATH))
    model = self_contained(model)
    lora, adapter = require_adapter(model)
    check_one_adapter(model)
    problems = adapter_problems(model)
    if model.spec.changed:
        problems.append("a base that is not the checkpoint's (after merge or add_tokens)")
    cure = "Merge first: mlx_lm.convert reads the folder of save_pretrained_merged."
    cure = merge_problem(model.spec) or cure
    raise_problems(ValueError, "mlx-lm's adapter format cannot hold:", problems, cure)
    config = model.spec.config
    pairs = dict(_pairs(config, lora, adapter))
    keys, rank = _keys(config, pairs), max(x.a.shape[-2] for x in pairs.values())
    # mlx-lm's models with a vision tower hold the text model as `language_model`.
    prefix = "" if config.wrapper is None else "language_model."
    tensors = {f"{prefix}{name}": x for name, x in _tensors(config, pairs, keys, rank)}
    check_adapter_tensors(tensors.items())
    path = writable_folder(folder, model.spec)
    if error := _other_adapter_error(path):
        raise error
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / MLX_WEIGHTS, tensors)
    settings = {
        "fine_tune_type": "lora",
        "model": model.spec.name_or_path,
        "num_layers": config.num_hidden_layers,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    write_json(path / CONFIG_FILE, settings)


def _other_adapter_error(folder: Path) -> ValueError | None:
    """Refuse a folder with a model or an adapter of PEFT's, whose config has the same name."""
    written = (MLX_WEIGHTS, CONFIG_FILE) if (folder / MLX_WEIGHTS).exists() else (MLX_WEIGHTS,)
    return other_model_error(folder, (*MODEL_FILES, "adapter_model.*", CONFIG_FILE), written)


def _pairs(config: LlamaConfig, lora: LoraConfig, adapter: Adapter) -> Iterator[tuple[str, _Pair]]:
    """mlx-lm's name of each adapted module, with A and B as torch has them."""
    for i, targets in enumerate(lora.targets):
        for t in targets:
            record = adapter["layers"][i][t.name]
            for name, rows in _modules(config, t.name):
                b = record.b[..., rows, :] * t.scaling
                yield f"model.layers.{i}.{name}", _Pair(record.a, b)
    if (head := lora.extras.lm_head) is not None and "lm_head" in adapter:
        record = adapter["lm_head"]
        yield "lm_head", _Pair(record.a, record.b * head.scaling)


def _modules(config: LlamaConfig, target: str) -> Iterator[tuple[str, slice]]:
    """(module within its layer, rows of B) of a target; two for the experts' gates and ups."""
    if target in EXPERTS:
        block = f"{expert_spelling(config).module}.switch_mlp"
        for kind, rows, _ in expert_matrices(config, target):
            yield f"{block}.{_MATRICES[kind]}", rows
    elif target == ROUTER:
        yield f"{expert_spelling(config).module}.gate", slice(None)
    else:
        yield projection_path(0, target).removeprefix("model.layers.0."), slice(None)


def _keys(config: LlamaConfig, pairs: dict[str, _Pair]) -> list[str]:
    """The adapted modules, by their names within a layer."""
    names = [name.removeprefix("model.layers.") for name in pairs]
    inside = [n.partition(".")[2] if n[0].isdigit() else n for n in names]
    return list(dict.fromkeys(inside))


def _tensors(
    config: LlamaConfig, pairs: dict[str, _Pair], keys: list[str], rank: int
) -> Iterator[tuple[str, Tensor]]:
    for name, (d_out, d_in, experts) in _shapes(config, keys).items():
        pair = pairs.get(name)
        if pair is None:
            lead = (experts,) if experts else ()
            zeros = partial(torch.zeros, dtype=torch.float32, device="cpu")
            pair = _Pair(zeros((*lead, rank, d_in)), zeros((*lead, d_out, rank)))
        r = pair.a.shape[-2]
        a = torch.nn.functional.pad(pair.a.detach().float(), (0, 0, 0, rank - r))
        b = torch.nn.functional.pad(pair.b.detach().float(), (0, rank - r))
        if not experts:
            a, b = a.t(), b.t()
        yield f"{name}.lora_a", a.contiguous().cpu()
        yield f"{name}.lora_b", b.contiguous().cpu()


def _shapes(config: LlamaConfig, keys: list[str]) -> dict[str, tuple[int, int, int]]:
    """Module -> (d_out, d_in, number of experts or 0), of all layers that have the module."""
    shapes: dict[str, tuple[int, int, int]] = {}
    for i in range(config.num_hidden_layers):
        for target in layer_targets(config, i):
            experts = config.num_local_experts if target in EXPERTS else 0
            for (name, _), (d_out, d_in) in zip(
                _modules(config, target), _matrix_shapes(config, target), strict=True
            ):
                if name in keys:
                    shapes[f"model.layers.{i}.{name}"] = (d_out, d_in, experts)
    if "lm_head" in keys:
        shapes["lm_head"] = (*target_shape(config, "lm_head"), 0)
    return shapes


def _matrix_shapes(config: LlamaConfig, target: str) -> list[tuple[int, int]]:
    if target in EXPERTS:
        return [shape for _, _, shape in expert_matrices(config, target)]
    return [target_shape(config, target)]
