"""restore_adapter(): put the adapter of a saved folder back into the model that it was saved from.

`load_adapter` reads any PEFT folder and makes new tensors. A run that resumes needs the opposite: a
folder with exactly the tensors of its model, copied into the tensors that its optimizer updates.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora.checkpoints.tensors import read_safetensors
from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.peft.base_tensors import base_tensors_out
from fastlora.formats.peft.expert_layout import unpack_experts
from fastlora.formats.peft.names import map_named, named_leaves, peft_state_dict
from fastlora.formats.peft.writing import WEIGHTS_FILE
from fastlora.models.init_offset import fold_offset, unfold_offset, with_offset
from fastlora.models.state import StateT, require_adapter


def restore_adapter(model: StateT, folder: Path) -> StateT:
    """Copy the values of a folder that `save_adapter` wrote into the model's adapter, in place.

    The file holds the adapter with the initial offset folded in; a model whose base has an offset
    is returned with the offset of the file. Other models are returned as the same object.

        file     {"...q_proj.lora_A.weight": [A; A0], "...q_proj.lora_B.weight": [B, -B0]}
    ->  adapter  {"q_proj": (A, B)}, values copied into the existing tensors
        base     {"q_proj": {"weight": W, "offset": (A0, B0)}}

    Raises:
        CheckpointError: the file is broken, or its tensors differ from the model's in name, shape
            or dtype; lists every difference.
        ValueError: the model has no adapter.
    """
    _, adapter = require_adapter(model)
    spec, folded = fold_offset(model.spec, model.base, adapter)
    lora, folded = require_adapter(replace(model, spec=spec, adapter=folded))
    expected = peft_state_dict(folded, lora) | base_tensors_out(spec, model.base)
    path = folder / WEIGHTS_FILE
    tensors = read_safetensors(path)
    problems = tensor_differences(tensors, expected, "the model")
    raise_problems(CheckpointError, f"{path} does not fit this model:", problems)

    def saved_leaf(key: str, leaf: Tensor) -> Tensor:
        return unpack_experts(key, tensors[key], leaf.shape[0]) if leaf.dim() == 3 else tensors[key]

    saved = map_named(saved_leaf, folded)
    values = named_leaves(saved)
    for key, leaf in named_leaves(adapter).items():
        leaf.copy_(values[key][tuple(map(slice, leaf.shape))])  # A of [A; A0], B of [B, -B0]
    if folded is adapter:
        return model
    # Copies: the tensors read are views of the file, which the run replaces or deletes later.
    device = model.base["norm"].device
    offsets = unfold_offset(tree_map(lambda x: x.to(device, copy=True), saved), adapter)
    return replace(model, base=with_offset(model.base, offsets))


def tensor_differences(
    saved: Mapping[str, Tensor], expected: Mapping[str, Tensor], owner: str
) -> list[str]:
    """One line for each tensor that differs in shape or dtype, or that only one side has.

    Args:
        saved: key -> tensor of a file.
        expected: key -> tensor that `owner` has.
        owner: for the message: "the model".
    """
    return [
        f"{key}: the file has {_form(saved.get(key))}, {owner} {_form(expected.get(key))}"
        for key in sorted(saved.keys() | expected.keys())
        if _form(saved.get(key)) != _form(expected.get(key))
    ]


def _form(x: Tensor | None) -> str:
    return "no such tensor" if x is None else f"{tuple(x.shape)} {x.dtype}"
