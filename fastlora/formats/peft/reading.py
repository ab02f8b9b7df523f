"""load_adapter(): any PEFT LoRA folder that PEFT can read for this base.

The folder is read and checked first (`_read_contents`); then the model is built from it. Nothing is
unpickled. Settings that fastlora does not support are refused by name.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.adapters.init.from_weights import weight_factors
from fastlora.arguments import check_arguments
from fastlora.checkpoints.hub import FOLDER_OR_ID, HUB_RULES, fetch_folder
from fastlora.checkpoints.tensors import read_json, read_safetensors
from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.peft.base_tensors import take_base_tensors, vocabulary_size
from fastlora.formats.peft.config_reading import REPEATABLE_INITS, config_from_peft
from fastlora.formats.peft.expert_layout import PREFIX, fuse_adapter, unpack_experts
from fastlora.formats.peft.names import (
    adapter_shapes,
    map_named,
    named_leaves,
    out_of_wrapper,
    tensor_problems,
)
from fastlora.formats.peft.writing import CONFIG_FILE, WEIGHTS_FILE
from fastlora.models.config import LlamaConfig
from fastlora.models.init_offset import with_offset
from fastlora.models.input_checks import MODEL
from fastlora.models.names import EDGE_WEIGHTS, EMBED_TOKENS, LM_HEAD, tensors_from_base
from fastlora.models.params import DTYPES, Adapter, Base
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import LoraConfig
from fastlora.models.state import StateT
from fastlora.ops.cast import cast as cast_matrices
from fastlora.ops.dispatch import refuse_transforms
from fastlora.runtime.layer_fetching import described, resident, with_edges_of


def load_adapter(
    model: StateT,
    folder_or_id: str | os.PathLike[str],
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> StateT:
    """The model's base with the adapter of a PEFT folder. An adapter of the model is replaced.

    Keys that PEFT writes for a compiled model ("_orig_mod.") or with its adapter's name
    (".default.") are accepted. If the folder also holds the base's embedding or head (after the
    vocabulary has grown), the model gets these too.

    Args:
        model: its base is the one that the adapter was trained on.
        folder_or_id: a local folder or a Hub id.
        token: Hub token; None uses the stored one.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept; None is huggingface_hub's cache.
        local_files_only: never use the network.

    Returns:
        A model on the base's device. Factors, magnitudes and trained rows are float32, or float64
        if the base is, as PEFT casts them; copies of complete tensors have the base's dtype.

    Raises:
        ValueError: an argument of a wrong type; lists all of them.
        FileNotFoundError: the folder, its config or its weights do not exist.
        CheckpointError: lists every wrong or unsupported setting and tensor of the folder. An
            adapter_model.bin is refused, because reading a pickle can run code.
    """
    refuse_transforms("fastlora.load_adapter")
    check_arguments(
        "fastlora.load_adapter",
        model=(model, MODEL),
        folder_or_id=(folder_or_id, FOLDER_OR_ID),
        token=(token, HUB_RULES["token"]),
        revision=(revision, HUB_RULES["revision"]),
        cache_dir=(cache_dir, HUB_RULES["cache_dir"]),
        local_files_only=(local_files_only, HUB_RULES["local_files_only"]),
    )
    folder = fetch_folder(
        folder_or_id,
        files=(CONFIG_FILE, WEIGHTS_FILE),
        token=token,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    contents = _read_contents(folder, model.spec.config)
    config, lora = contents.config, contents.lora
    # self_contained removes the initial offset of the adapter that is replaced.
    base, changed = _with_base_tensors(self_contained(model).base, contents)
    adapter = _adapter_tree(contents, base["norm"])
    matrices = tensors_from_base(config, base)
    # The file's values are finite, but a float32 value can be too large for a float16 base.
    leaves = named_leaves(adapter) | {name: matrices[name] for name in changed}
    problems = [
        f"too large   {k} for {x.dtype}" for k, x in leaves.items() if not x.isfinite().all()
    ]
    raise_problems(CheckpointError, f"{folder / WEIGHTS_FILE} does not fit:", problems)
    changed = tuple(dict.fromkeys((*model.spec.changed, *changed)))
    spec = replace(model.spec, config=config, lora=lora, changed=changed)
    if lora.init_lora_weights in REPEATABLE_INITS:
        # The same decomposition of the base's weights as when training began. These methods draw no
        # random numbers, so the generator has no effect.
        offsets = weight_factors(spec, base, torch.Generator())
        dtype = _factor_dtype(base["norm"])
        base = with_offset(base, [cast_matrices(x, dtype) for x in offsets])
    return replace(model, spec=spec, base=base, adapter=adapter)


# ── the folder's contents ─────────────────────────────────────────────────────────────────


class _Contents(NamedTuple):
    """An adapter's folder, read and checked against a base's config."""

    config: LlamaConfig  # the base's, with the vocabulary of the file
    lora: LoraConfig
    tensors: dict[str, Tensor]  # PEFT's key -> tensor of the adapter
    base_tensors: dict[str, Tensor]  # name on disk -> embedding and head of the base


def _read_contents(folder: Path, base_config: LlamaConfig) -> _Contents:
    raw = read_json(_existing_file(folder, CONFIG_FILE))
    path = _existing_file(folder, WEIGHTS_FILE)
    tensors, problems = _canonical_keys(read_safetensors(path))
    if base_config.wrapper is not None:
        tensors, other_problems = out_of_wrapper(tensors)
        problems += other_problems
    v, vocabulary_problems = vocabulary_size(tensors, base_config)
    config, tied = replace(base_config, vocab_size=v), base_config.tie_word_embeddings
    # trainable_token_indices may name rows that only the file's vocabulary has.
    lora = config_from_peft(raw, config, str(folder / CONFIG_FILE))
    tensors, base_tensors, base_problems = take_base_tensors(
        tensors, lora, DTYPES.values(), tied=tied
    )
    if v > base_config.vocab_size and not (base_tensors or _reads_copies_only(lora, tied)):
        base_problems.append(
            f"rows        {v}, the base has {base_config.vocab_size}, but the file holds no matrix"
            " of the base itself: save it with save_embedding_layers=True"
        )
    tensors, expert_problems = fuse_adapter(tensors, lora, config)
    problems += vocabulary_problems + base_problems
    # Wrong tensors of single experts would be reported a second time, as missing fused ones.
    problems += expert_problems or tensor_problems(tensors, lora, config, DTYPES.values())
    cure = f"If the weights are right, check that {CONFIG_FILE} and the base model belong to them."
    raise_problems(CheckpointError, f"{path} does not fit:", problems, cure)
    return _Contents(config, lora, tensors, base_tensors)


def _existing_file(folder: Path, name: str) -> Path:
    """The path of a file of the folder.

    Raises:
        CheckpointError: the weights are a pickle.
        FileNotFoundError: the file does not exist; names sub-folders that have it.
    """
    if (path := folder / name).is_file():
        return path
    if name == WEIGHTS_FILE and (pickled := folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{pickled} is a pickle. Reading a pickle can run code, so fastlora does not read it;"
            " convert it once where you trust it: peft_model.save_pretrained(folder) writes"
            f" {WEIGHTS_FILE}."
        )
    # PEFT saves an adapter that is not named "default" in a sub-folder of that name.
    inside = sorted(p.parent.name for p in folder.glob(f"*/{name}"))
    cure = f"load one of its sub-folders: {inside}." if inside else "is it a PEFT adapter's?"
    raise FileNotFoundError(f"{folder} has no {name}; {cure}")


def _canonical_keys(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors under the keys that names.py knows, problems)."""
    renamed, problems = {}, []
    for key, tensor in tensors.items():
        plain = key.replace("_orig_mod.", "")
        plain = re.sub(r"\.lora_(\w+)\.default\b", r".lora_\1", plain)
        # With bias="all" or a grown vocabulary, PEFT writes a module of modules_to_save three times
        # and reads only the key without these parts.
        short = re.sub(r"\.(original_module|modules_to_save)\.(bias|weight)$", r".\2", plain)
        if short != plain and short in tensors:
            continue
        if plain in renamed:
            problems.append(f"twice       {key}, also there as {plain}")
        renamed[plain] = tensor
    return renamed, problems


def _reads_copies_only(lora: LoraConfig, tied: bool) -> bool:
    """Whether the adapter has trained copies of both embedding and head.

    Then the model never reads the base's own, and these need not have the new rows.
    """
    copies = {EMBED_TOKENS, LM_HEAD} & {*lora.extras.replaced}
    return len(copies) == 2 or (tied and lora.extras.tied and bool(copies))


# ── the model ─────────────────────────────────────────────────────────────────────────────


def _with_base_tensors(base: Base, contents: _Contents) -> tuple[Base, list[str]]:
    """Put the file's embedding and head into the base.

    If the vocabulary has grown and the file holds only a trained copy, the base gets the copy's
    values: no other source has the new rows.

    Returns:
        The base, and the names on disk of the tensors that differ from the given base's.
    """
    names = {name: key for key, name in EDGE_WEIGHTS.items() if key in base}
    changed: dict[str, Tensor] = {}
    for name, key in names.items():
        new, shape = contents.base_tensors.get(name), described(base)[key].shape
        if new is None and shape[0] < contents.config.vocab_size:
            new = contents.tensors.get(f"{PREFIX}{name}")
        if new is None:
            continue
        value = new.to(base["norm"].device, base["norm"].dtype, copy=True)
        if value.shape != shape or not torch.equal(value, resident(base[key])):
            changed[key] = value
    new_base: Any = with_edges_of({**base, **changed}, base) if changed else base
    return new_base, [name for name, key in names.items() if key in changed]


def _adapter_tree(contents: _Contents, norm: Tensor) -> Adapter:
    """The adapter's tree from the file's tensors, as copies, because these are views of the file.

    Args:
        contents: of the folder.
        norm: a norm of the base, whose device and dtype decide the adapter's.
    """

    def leaf(key: str, shape: tuple[int, ...]) -> Tensor:
        x = contents.tensors[key]
        if ".mlp.experts." in key:
            x = unpack_experts(key, x, contents.config.num_local_experts)
        is_copy = key.endswith((".weight", ".bias")) and ".lora_" not in key
        dtype = norm.dtype if is_copy else _factor_dtype(norm)
        return x.to(norm.device, dtype, copy=True).contiguous()

    return map_named(leaf, adapter_shapes(contents.lora, contents.config))


def _factor_dtype(norm: Tensor) -> torch.dtype:
    return torch.promote_types(norm.dtype, torch.float32)
