"""load(): read a model and its tokenizer from a folder, the Hub, or the shipped demo.

A checkpoint's folder gives a model without an adapter. A PEFT adapter's folder names its base,
which is loaded first.
"""

import os
from pathlib import Path
from typing import Any

import torch

from fastlora.arguments import (
    FLAG,
    Rule,
    argument_problems,
    describe,
    instance,
    one_of,
    optional,
    whole_number,
)
from fastlora.checkpoints.hub import FOLDER_OR_ID, HUB_RULES, find_folder, is_file_name, path_text
from fastlora.checkpoints.reading import CheckedBase, Precision, check_base, read_checked
from fastlora.checkpoints.tensors import INDEX, WEIGHTS, read_json
from fastlora.distributed.launch import own_device
from fastlora.distributed.mesh import SHARD, shard_problem
from fastlora.distributed.reading import load_sharded
from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.peft.reading import load_adapter
from fastlora.model import Model
from fastlora.models.config import LlamaConfig
from fastlora.models.params import DTYPES, Base
from fastlora.models.rope_json import rope_scaling_problems
from fastlora.models.spec import Spec
from fastlora.ops.dispatch import refuse_transforms
from fastlora.runtime.devices import device_problem
from fastlora.runtime.first_step import importing_compiler
from fastlora.text.tokenizer import Tokenizer

_RULES = {
    "model_name": Rule(FOLDER_OR_ID.accepts, "a folder's path, a Hub id, or 'demo'"),
    "max_seq_length": optional(whole_number(1)),
    "dtype": Rule(
        lambda x: (
            (type(x) is str and x in ("auto", *DTYPES))
            or (isinstance(x, torch.dtype) and x in DTYPES.values())
        ),
        f"'auto', a torch dtype or its name: {', '.join(DTYPES)}",
    ),
    "load_in_4bit": FLAG,
    "base_precision": one_of("checkpoint", "fp8"),
    "rope_scaling": optional(instance(dict, "a dict with rope_type, factor, ...")),
    "shard": SHARD,
    **HUB_RULES,
}


def load(
    model_name: str | os.PathLike[str],
    *,
    max_seq_length: int | None = None,
    dtype: torch.dtype | str = "auto",
    load_in_4bit: bool = False,
    base_precision: str = "checkpoint",
    device: torch.device | str = "auto",
    rope_scaling: dict[str, Any] | None = None,
    shard: Any = None,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> tuple[Model, Tokenizer | None]:
    """Load a model and its tokenizer from a folder, the Hub, or the demo that ships with fastlora.

    On the CPU, in the checkpoint's dtype, the weights are memory-mapped: do not change or delete
    the files while the model is in use.

    Args:
        model_name: a local folder in Hugging Face layout, a Hub id, a PEFT adapter's folder or id
            (its base is loaded, then the adapter), or "demo". A pathlib.Path is always a folder.
        max_seq_length: longest input accepted, in tokens; None is the config's
            max_position_embeddings.
        dtype: of the base weights; "auto" is the checkpoint's.
        load_in_4bit: quantise the projections to NF4 with double quantisation, through
            bitsandbytes, one tensor at a time on the device. Embedding, head and norms keep their
            dtype. A checkpoint that bitsandbytes has quantised to 4 or 8 bits is recognised and
            never quantised again.
        base_precision: "fp8" quantises the projections to e4m3 with one scale per row, one tensor
            at a time on the device, and rounds the inputs and gradients of their products so, too
            (ops/linear/fp8.py). Adapters, embedding, head, norms and everything between the
            products keep their dtype. It is faster in bfloat16 on GPUs with fp8 products (compute
            capability 8.9 and higher) and takes half of the base's memory; elsewhere the same
            values are multiplied in the model's dtype. "checkpoint": as the files are, or as
            load_in_4bit says. An adapter's folder does not record it: give it again when you load
            the adapter. Not for mixtures of experts and quantised checkpoints.
        device: "auto" is CUDA if there is one, else the CPU. In a process that torchrun started,
            "auto" and "cuda" are cuda:LOCAL_RANK, which becomes CUDA's current device.
        rope_scaling: replaces the checkpoint's RoPE scaling; keys as in config.json. A key that
            its rope_type does not read is refused. An adapter's folder does not record it, as in
            PEFT: give it again when you load the adapter.
        shard: how the frozen base is kept (distributed/README.md). None: whole, on the device of
            every rank. A number: sharded over groups of so many ranks; "node": over the ranks of
            each machine; "auto": over as few of them as the base needs. A group of one rank is as
            None. A DeviceMesh: over its last dimension. "host": in host memory, sharded over the
            ranks of each machine if there are several; layers are copied to the device before they
            run. Losses and gradients are the same bits. Every rank must make the same calls. Not
            for mixtures of experts.
        token: Hub token; None uses the stored one.
        revision: branch, tag or commit on the Hub, of the repository that `model_name` names. For
            an adapter, the base's revision is the one that adapter_config.json names.
            `save_pretrained` writes the base's revision there.
        cache_dir: where downloads are kept; None is huggingface_hub's cache.
        local_files_only: never use the network.

    Returns:
        The model and its tokenizer. The tokenizer is None if the folder has no tokenizer.json.

    Raises:
        ValueError: an argument of a wrong type or value; lists all of them. Or the model does not
            support load_in_4bit or base_precision.
        ModuleNotFoundError: load_in_4bit without bitsandbytes.
        FileNotFoundError: the folder, the repository, or a file in it does not exist.
        PermissionError: the repository is gated.
        CheckpointError: files have wrong contents (lists all problems), or the folder holds the
            weights of both a model and an adapter.
    """
    refuse_transforms("fastlora.load")
    given = {"model_name": model_name, "max_seq_length": max_seq_length, "dtype": dtype}
    given |= {"load_in_4bit": load_in_4bit, "rope_scaling": rope_scaling, "token": token}
    given |= {"shard": shard, "base_precision": base_precision}
    given |= {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    problems = argument_problems({name: (value, _RULES[name]) for name, value in given.items()})
    if type(device) is str and device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if load_in_4bit is True and base_precision == "fp8":
        problems.append('load_in_4bit=True and base_precision="fp8": choose one of them')
    if not problems and (problem := shard_problem(shard)):
        problems.append(problem)
    if problem := device_problem(device, types=("cpu", "cuda")):
        problems.append(problem)
    else:
        device = own_device(torch.device(device))
    # A value that is not a dict breaks its rule above.
    if isinstance(rope_scaling, dict):
        problems += rope_scaling_problems(rope_scaling)
    raise_problems(ValueError, "fastlora.load cannot use these arguments:", problems)
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    name, adapter_folder = path_text(model_name), None
    # This look-up is of the argument itself. A base that is missing is one that the adapter names.
    try:
        folder = find_folder(name, revision=revision, **hub)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"model_name={name!r}: {error}") from error
    # From here on name, revision and folder are the base's. The spec records them, so that an
    # adapter that is trained over this model names the same base.
    if _is_adapter(folder):
        name, revision = _base_of(folder)
        folder, adapter_folder = find_folder(name, revision=revision, **hub), folder
    # Before the weights: a broken tokenizer.json then fails before gigabytes are read.
    tokenizer = _tokenizer(folder, adapter_folder)
    precision = "nf4" if load_in_4bit else "fp8" if base_precision == "fp8" else None
    config, base = _read_base(folder, device, shard, dtype, rope_scaling, precision)
    spec = Spec(
        config=config,
        name_or_path=name,
        # A local folder has no revisions, so the argument was not used.
        revision=None if name == "demo" or folder == Path(name) else revision,
        base_folder=str(folder.resolve()),
        max_seq_length=max_seq_length or config.max_position_embeddings,
    )
    model = Model(spec=spec, base=base, adapter=None)
    return (model if adapter_folder is None else load_adapter(model, adapter_folder)), tokenizer


def _read_base(
    folder: Path,
    device: torch.device | str,
    shard: Any,
    dtype: torch.dtype | str,
    rope_scaling: dict[str, Any] | None,
    quantize: Precision | None,
) -> tuple[LlamaConfig, Base]:
    """Config and base of a folder, with `load`'s arguments."""
    wanted = None if dtype == "auto" else DTYPES[str(dtype).removeprefix("torch.")]
    how = {"dtype": wanted, "rope_scaling": rope_scaling, "quantize": quantize}
    try:
        if shard is None:
            return _read_whole(check_base(folder, **how), torch.device(device))
        return load_sharded(folder, shard, torch.device(device), **how)
    except CheckpointError as error:
        if rope_scaling is None:
            raise
        # The error names fields of config.json, but the wrong value may be the argument's.
        replaced = f"with rope_scaling={describe(rope_scaling)} in place of the file's: "
        raise CheckpointError(f"{replaced}{error}") from error


def _read_whole(checked: CheckedBase, device: torch.device) -> tuple[LlamaConfig, Base]:
    """A base on one device. While dense weights are read to a GPU, a thread imports the compiler.

    To quantise, this thread imports dynamo (bitsandbytes) or Triton (our kernels), and two threads
    must not be in one circular import.
    """
    with importing_compiler(checked.is_dense and device.type == "cuda"):
        return read_checked(checked, device)


def _is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter's. An adapter's may hold its base's config.json too.

    Raises:
        CheckpointError: the folder holds the weights of a model and of an adapter.
    """
    has = lambda *names: any((folder / name).is_file() for name in names)
    if not has("adapter_config.json"):
        return False
    has_model = has("config.json") and has(WEIGHTS, INDEX)
    if has_model and has("adapter_model.safetensors", "adapter_model.bin"):
        raise CheckpointError(
            f"{folder} holds a model ({WEIGHTS}) and an adapter (adapter_model.safetensors), so it"
            " is not clear which of them is meant. Move the adapter_* files to another folder; to"
            " use both, load the model and call fastlora.load_adapter(model, that_folder)."
        )
    return not has_model


def _base_of(adapter_folder: Path) -> tuple[str, str | None]:
    """Name and revision of an adapter's base, from its adapter_config.json."""
    path = adapter_folder / "adapter_config.json"
    raw = read_json(path)
    name, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise CheckpointError(
            f"{path} does not name its base: base_model_name_or_path is {name!r:.200}, revision "
            f"{revision!r:.200}. Load the base, then fastlora.load_adapter(model, folder)."
        )
    if not is_file_name(name):
        raise CheckpointError(
            f"{path}: base_model_name_or_path is {name!r:.200}, which cannot name a folder or a "
            "repository. Load the base, then fastlora.load_adapter(model, folder)."
        )
    return name, revision


def _tokenizer(folder: Path, adapter_folder: Path | None) -> Tokenizer | None:
    """The adapter's tokenizer, which may have a newer chat template, else the base's."""
    if adapter_folder is not None:
        tokenizer = Tokenizer.from_folder(adapter_folder, config_folder=folder)
        if tokenizer is not None:
            return tokenizer
    return Tokenizer.from_folder(folder)
