"""save_adapter() and push_to_hub(): an adapter as a PEFT folder, on disk or on the Hub.

PEFT reads the folder without a warning, and its model computes the same logits.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlora.adapters.init.methods import moves_base
from fastlora.checkpoints.hub import upload
from fastlora.checkpoints.output_folders import MODEL_FILES, folder_error, other_model_error
from fastlora.checkpoints.tensors import read_json, write_json, write_safetensors, write_text
from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.peft.base_tensors import base_problem, base_tensors_out
from fastlora.formats.peft.config_writing import edge_targets, peft_config, targets_by_name
from fastlora.formats.peft.names import in_wrapper, peft_state_dict, tensor_problems
from fastlora.models.params import DTYPES
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import LoraConfig, Spec
from fastlora.models.stacks import check_one_adapter
from fastlora.models.state import ModelState, require_adapter
from fastlora.ops.dispatch import refuse_transforms

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"  # mlx-lm's file, beside another adapter_config.json


def save_adapter(model: ModelState, folder: str | os.PathLike[str]) -> None:
    """Write a PEFT folder: the weights, README.md, then adapter_config.json.

    Tensors keep their dtypes. An initial offset is folded into the adapter, which doubles its rank.
    Embedding and head are written too if they differ from the checkpoint's (after `add_tokens`). If
    other tensors of the base differ (after `merge`), saving is refused, because the folder would
    give other logits. A README.md that exists is kept, because the user may have written it.

    Args:
        model: with an adapter.
        folder: created if it does not exist.

    Raises:
        ValueError: before any file is written, if the model has no adapter or a stack, the adapter
            does not fit the spec or holds NaN or infinity, its initial offset is missing, the base
            is not the checkpoint's, or the folder is a file, the base model's folder, or holds the
            weights of a model or of an adapter for mlx-lm.
        PermissionError: the folder cannot be written to.
    """
    # Parked originals stay on the host: the file holds the trained copies, not the originals.
    refuse_transforms("Model.save_pretrained")
    model = self_contained(model, unpark=False)
    lora, adapter = require_adapter(model)
    check_one_adapter(model)
    if moves_base(lora.init_lora_weights):
        raise ValueError(
            f"init_lora_weights={lora.init_lora_weights!r}: this adapter needs an initial offset in"
            " the model's base, and the base has none; call model.save_pretrained(folder) on a"
            " model that still has it."
        )
    if problem := base_problem(model.spec):
        raise ValueError(f"The adapter cannot be saved alone: {problem}.")
    tensors = peft_state_dict(adapter, lora)
    # The same check as in load_adapter, so that every folder that is written can be read.
    problems = tensor_problems(tensors, lora, model.spec.config, DTYPES.values())
    raise_problems(ValueError, "The adapter does not fit its spec, or is broken:", problems)
    if error := adapter_folder_error(path := Path(folder), model.spec):
        raise error
    path.mkdir(parents=True, exist_ok=True)
    config = peft_config(model.spec, lora)
    tensors |= base_tensors_out(model.spec, model.base)
    if model.spec.config.wrapper is not None:
        tensors = {in_wrapper(key): x for key, x in tensors.items()}
    write_safetensors(path / WEIGHTS_FILE, tensors)
    # If writing fails from here on, the new weights must not be left beside other settings.
    if (path / CONFIG_FILE).is_file() and _differs(path / CONFIG_FILE, config):
        (path / CONFIG_FILE).unlink()
    if not (path / "README.md").exists():
        write_text(path / "README.md", readme(model.spec, lora))
    # The config comes last: PEFT and fastlora do not load a folder without it.
    write_json(path / CONFIG_FILE, config)


def adapter_folder_error(path: Path, spec: Spec) -> ValueError | PermissionError | None:
    """The reason why an adapter must not, or cannot, be written to a folder; None if it can.

    `load` refuses a folder with a model and an adapter. Another PEFT adapter may be replaced.
    """
    others = (*MODEL_FILES, MLX_WEIGHTS)
    return folder_error(path, spec) or other_model_error(path, others)


def _differs(path: Path, config: Mapping[str, Any]) -> bool:
    try:
        return read_json(path) != config
    except CheckpointError:
        return True


def push_to_hub(
    model: ModelState,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
) -> str:
    """Upload the adapter's PEFT folder to the Hub and return the repository's URL.

    If the base was loaded from a local folder, the uploaded files do not name it: its path means
    nothing elsewhere. Whoever loads the adapter then gives the base.

    Args:
        model: with an adapter.
        repo_id: "user/name"; created if it does not exist.
        token: Hub token; None uses the stored one.
        private: of a new repository; None is the account's default.

    Raises:
        ValueError: as `save_adapter`.
        PermissionError: there is no token, or it may not write to the repository.
        ConnectionError: the Hub was not reached, or offline mode is on.
    """
    if _is_local(model.spec.name_or_path):
        model = replace(model, spec=replace(model.spec, name_or_path="", revision=None))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        return upload(Path(folder), repo_id, token=token, private=private)


def _is_local(name: str) -> bool:
    """Whether a base's name is a path of this machine, and neither a Hub id nor the demo."""
    return name != "demo" and not is_hub_id(name)


def is_hub_id(name: str) -> bool:
    """Whether a base's name can be a repository of the Hub, and is not a path."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def readme(spec: Spec, lora: LoraConfig) -> str:
    """README.md of an adapter: a model card with its base, rank and targets."""
    name = spec.name_or_path
    # The Hub rejects a model card whose base_model is not a Hub id, such as a local path.
    is_id = "/" in name and is_hub_id(name)
    base = [f"base_model: {name}"] if is_id else []
    tags = [f"- base_model:adapter:{name}"] if is_id else []
    front = [*base, "library_name: peft", "pipeline_tag: text-generation", "tags:", *tags, "- lora"]
    names = ", ".join([*targets_by_name(lora), *(t.name for t in edge_targets(lora).values())])
    return "\n".join(
        [
            *("---", *front, "---", ""),
            f"# LoRA adapter for {name or 'a model that is not on the Hub'}",
            "",
            f"Rank {lora.r}, alpha {lora.lora_alpha:g}, on {names}. Trained with fastlora; read by",
            '`fastlora.load_adapter` and by `peft.PeftModel.from_pretrained(base, "this folder")`.',
            "",
        ]
    )
