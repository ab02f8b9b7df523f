"""reading."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.adapters.init.from_weights import weight_factors
from fastlora.checkpoints.hub import resolve
from fastlora.checkpoints.tensors import read_json, read_safetensors
from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.peft.base_tensors import take_base_tensors, vocabulary_rows
from fastlora.formats.peft.config import REPEATABLE_INITS, config_from_peft
from fastlora.formats.peft.expert_layout import PREFIX, fuse_adapter, unpacked
from fastlora.formats.peft.names import adapter_shapes, map_named, named_leaves, tensor_problems
from fastlora.formats.peft.writing import CONFIG_FILE, WEIGHTS_FILE
from fastlora.models.config import LlamaConfig
from fastlora.models.init_offset import with_offset
from fastlora.models.names import EMBED_TOKENS, END_WEIGHTS, LM_HEAD, tensors_from_base
from fastlora.models.params import DTYPES, Base
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import LoraConfig
from fastlora.models.state import StateT
from fastlora.ops.cast import cast as cast_matrices


# ── adapter in ────────────────────────────────────────────────────────────────────────────
def load_adapter(
    model: StateT,
    folder_or_id: str | os.PathLike[str],
    *,
    token: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> StateT:
    """The model's base with the adapter of a PEFT folder, in place of any it carried.

    Tensors become float32 (float64 over a float64 base), as PEFT casts them, copies of whole
    tensors the base's dtype; the device is the base's. A folder with an embedding or a head of its
    own (PEFT's save_embedding_layers, a vocabulary that grew) gives the model a base that has it.
    Keys of a compiled model ("_orig_mod.") and keys with PEFT's adapter name (".default.") are read
    as what they stand for.

    Raises:
        FileNotFoundError: if the folder, its config or its weights are not there.
        CheckpointError: naming file and key of everything in it that is wrong, or that this version
            cannot represent. Nothing is ever unpickled: an adapter_model.bin is refused.
    """
    folder = resolve(
        folder_or_id,
        files=(CONFIG_FILE, WEIGHTS_FILE),
        token=token,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    config, lora, tensors, own = _contents(folder, model.spec.config)
    base, changed = _with_own(self_contained(model).base, own, tensors, config)
    norm = base["norm"]
    dtype = torch.promote_types(norm.dtype, torch.float32)

    def read(key: str, shape: tuple[int, ...]) -> Tensor:
        x = tensors[key]
        if ".mlp.experts." in key:
            x = unpacked(key, x, config.num_local_experts)
        # Copies: what was read is a view of the file. Whole tensors keep the base's dtype.
        kind = norm.dtype if key.endswith((".weight", ".bias")) and ".lora_" not in key else dtype
        return x.to(norm.device, kind, copy=True).contiguous()

    adapter = map_named(read, adapter_shapes(lora, config))
    matrices = tensors_from_base(config, base)
    leaves = named_leaves(adapter) | {name: matrices[name] for name in changed}
    problems = [
        f"too large   {k} for {x.dtype}" for k, x in leaves.items() if not x.isfinite().all()
    ]
    raise_problems(CheckpointError, f"{folder / WEIGHTS_FILE} does not fit:", problems)
    changed = tuple(dict.fromkeys((*model.spec.changed, *changed)))
    spec = replace(model.spec, config=config, lora=lora, changed=changed)
    if lora.init_lora_weights in REPEATABLE_INITS:
        found = weight_factors(spec, base, torch.Generator(), (4, 1))  # neither draws nor quantises
        base = with_offset(base, [cast_matrices(x, dtype) for x in found])
    return replace(model, spec=spec, base=base, adapter=adapter)


class _Contents(NamedTuple):
    """An adapter's folder, read and checked against a base's config."""

    config: LlamaConfig  # with the vocabulary that the file has
    lora: LoraConfig
    tensors: dict[str, Tensor]  # PEFT's key -> the adapter's
    own: dict[str, Tensor]  # name on disk -> the base's embedding and head that the file brings


def _contents(folder: Path, present: LlamaConfig) -> _Contents:
    raw = read_json(_file(folder, CONFIG_FILE))
    path = _file(folder, WEIGHTS_FILE)
    tensors, problems = _canonical(read_safetensors(path))
    v, of_vocabulary = vocabulary_rows(tensors, present)
    config, tied = replace(present, vocab_size=v), present.tie_word_embeddings
    lora = config_from_peft(raw, config, str(folder / CONFIG_FILE))
    tensors, own, of_base = take_base_tensors(tensors, lora, DTYPES.values(), tied=tied)
    if v > present.vocab_size and not (own or _reads_copies_only(lora, tied)):
        of_base.append(
            f"rows        {v}, {present.vocab_size} of the base, but the file holds no matrix of"
            " the base itself: save it with save_embedding_layers=True"
        )
    tensors, of_experts = fuse_adapter(tensors, lora, config)
    problems += of_vocabulary + of_base
    problems += of_experts or tensor_problems(tensors, lora, config, DTYPES.values())
    cure = f"If the weights are right, check that {CONFIG_FILE} and the base model belong to them."
    raise_problems(CheckpointError, f"{path} does not fit:", problems, cure)
    return _Contents(config, lora, tensors, own)


def _reads_copies_only(lora: LoraConfig, tied: bool) -> bool:
    """Whether copies stand in for every matrix of embedding and head, so that a base without the
    new rows is never read."""
    copies = {EMBED_TOKENS, LM_HEAD} & {*lora.extras.replaced}
    return len(copies) == 2 or (tied and lora.extras.tied and bool(copies))


def _with_own(
    base: Base, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], config: LlamaConfig
) -> tuple[Base, list[str]]:
    """(the base with the embedding and head that a file brings, names of those that it changes).

    Where the vocabulary grew and only a trained copy is there, the base has its values too: rows
    that it never had are known from nowhere else.
    """
    names = {name: key for key, name in END_WEIGHTS.items() if key in base}
    changed: dict[str, Tensor] = {}
    for name, key in names.items():
        brought = own.get(name)
        if brought is None and base[key].shape[0] < config.vocab_size:
            brought = tensors.get(f"{PREFIX}{name}")
        if brought is None:
            continue
        value = brought.to(base["norm"].device, base["norm"].dtype, copy=True)
        if value.shape != base[key].shape or not torch.equal(value, base[key]):
            changed[key] = value
    whole: Any = {**base, **changed}
    return whole, [name for name, key in names.items() if key in changed]


def _file(folder: Path, name: str) -> Path:
    """A file of the folder; where it is not there, the error says what is."""
    if (path := folder / name).is_file():
        return path
    if name == WEIGHTS_FILE and (pickled := folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{pickled} is a pickle, which can run code when it is read, so fastlora does not;"
            " convert it once where you trust it: peft_model.save_pretrained(folder) writes"
            f" {WEIGHTS_FILE}."
        )
    inside = sorted(p.parent.name for p in folder.glob(f"*/{name}"))
    cure = f"load one of its sub-folders: {inside}." if inside else "is it a PEFT adapter's?"
    raise FileNotFoundError(f"{folder} has no {name}; {cure}")


def _canonical(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under PEFT's plain names, without compile's and the adapter's name in between."""
    renamed, problems = {}, []
    for key, tensor in tensors.items():
        plain = key.replace("_orig_mod.", "")
        plain = re.sub(r"\.lora_(\w+)\.default\b", r".lora_\1", plain)
        # Beside bias="all", or a vocabulary that grew, PEFT writes a module that is saved whole
        # twice more, and takes neither of the two for the copy.
        own = re.sub(r"\.(original_module|modules_to_save)\.(bias|weight)$", r".\2", plain)
        if own != plain and own in tensors:
            continue
        if plain in renamed:
            problems.append(f"twice       {key}, also there as {plain}")
        renamed[plain] = tensor
    return renamed, problems
