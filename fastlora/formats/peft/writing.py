"""Adapters out to PEFT folders and back in.

What is written is read by PEFT without a warning; what is read is any PEFT LoRA folder whose
adapter is a sum scaling * B A over projections. Everything else is refused by name.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlora.adapters.init.from_weights import moves_base
from fastlora.checkpoints.hub import upload
from fastlora.checkpoints.output_folders import writable
from fastlora.checkpoints.tensors import read_json, write_json, write_safetensors, write_text
from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.peft.base_tensors import base_tensors_out
from fastlora.formats.peft.config import edge_targets, peft_config, targets_by_name
from fastlora.formats.peft.names import peft_state_dict, tensor_problems
from fastlora.models.params import DTYPES
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import LoraConfig, Spec
from fastlora.models.state import ModelState, require_adapter

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


# ── adapter out ───────────────────────────────────────────────────────────────────────────
def save_adapter(model: ModelState, folder: str | os.PathLike[str]) -> None:
    """Write a PEFT folder: the weights, README.md and adapter_config.json, in this order.

    Tensors keep their dtype. An embedding and a head that are not those of the checkpoint any more
    (`add_tokens`) are written too. A README.md that is there stays: it may be the user's own.

    Raises:
        ValueError: before any file is written, if there is no adapter, it does not fit the spec or
            holds NaN or infinity, or counts from start factors (`llama.start.equivalent` gives what
            to save), or the folder is a file or the base model's own.
        PermissionError: if the folder cannot be written to.
    """
    model = self_contained(model, unpark=False)
    lora, adapter = require_adapter(model)
    if moves_base(lora.init_lora_weights):
        raise ValueError(
            f"an adapter that began as {lora.init_lora_weights!r} is not saved without its start"
            " factors: call model.save_pretrained(folder), which has them."
        )
    tensors = peft_state_dict(adapter, lora)
    problems = tensor_problems(tensors, lora, model.spec.config, DTYPES.values())
    raise_problems(ValueError, "The adapter does not fit its spec, or is broken:", problems)
    path = writable(folder, model.spec)
    path.mkdir(parents=True, exist_ok=True)
    config = peft_config(model.spec, lora)
    write_safetensors(path / WEIGHTS_FILE, tensors | base_tensors_out(model.spec, model.base))
    # If what follows fails, new weights must not be read with an older adapter's settings.
    if (path / CONFIG_FILE).is_file() and _differs(path / CONFIG_FILE, config):
        (path / CONFIG_FILE).unlink()
    if not (path / "README.md").exists():
        write_text(path / "README.md", _readme(model.spec, lora))
    write_json(path / CONFIG_FILE, config)


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
    """Upload the PEFT folder to the Hub, creating the repository if need be; gives its URL.

    Args:
        model: with an adapter.
        repo_id: "user/name".
        token: None is the one huggingface_hub is logged in with.
        private: for a repository that is created here; None is the account's default.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        return upload(Path(folder), repo_id, token=token, private=private)


def _readme(spec: Spec, lora: LoraConfig) -> str:
    name = spec.name_or_path
    # The Hub refuses a card whose base_model is not an id of its own, such as a local path.
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
    base = [f"base_model: {name}"] if is_id else []
    tags = [f"- base_model:adapter:{name}"] if is_id else []
    front = [*base, "library_name: peft", "pipeline_tag: text-generation", "tags:", *tags, "- lora"]
    names = ", ".join([*targets_by_name(lora), *(t.name for t in edge_targets(lora).values())])
    return "\n".join(
        [
            *("---", *front, "---", ""),
            f"# LoRA adapter for {name}",
            "",
            f"Rank {lora.r}, alpha {lora.lora_alpha:g}, on {names}. Trained with fastlora; read by",
            '`fastlora.load_adapter` and by `peft.PeftModel.from_pretrained(base, "this folder")`.',
            "",
        ]
    )
