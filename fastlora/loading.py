"""load(): from a name to a model on its device."""

import os
from pathlib import Path
from typing import Any

import torch

from fastlora.checkpoints.hub import find_folder
from fastlora.checkpoints.reading import read_base
from fastlora.checkpoints.tensors import DTYPES, read_json
from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.peft.reading import load_adapter
from fastlora.model import Model
from fastlora.models.spec import Spec
from fastlora.text.tokenizer import Tokenizer


def load(
    model_name: str | os.PathLike[str],
    *,
    max_seq_length: int | None = None,
    dtype: torch.dtype | str = "auto",
    load_in_4bit: bool = False,
    device: torch.device | str = "auto",
    rope_scaling: dict[str, Any] | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> tuple[Model, Tokenizer | None]:
    """A model and its tokenizer, from a folder, the Hub, or the package's own demo.

    On the CPU, in the checkpoint's dtype, the weights are views of the mapped files: leave those
    in place while the model lives.

    Args:
        model_name: a local folder in Hugging Face layout, a Hub id, a PEFT adapter's folder or id
            (its base is loaded, then the adapter), or "demo".
        max_seq_length: longest input accepted, in tokens; None is the config's
            max_position_embeddings.
        dtype: of the base weights; "auto" is the checkpoint's.
        load_in_4bit: the projections in NF4 with double quantisation, through bitsandbytes, one
            tensor at a time on the device; embedding, head and norms stay as they are. A checkpoint
            in 4 or 8 bits (bitsandbytes') is recognised by itself and never quantised again.
        device: "auto" is CUDA if there is one, else the CPU.
        rope_scaling: replaces the checkpoint's RoPE scaling; spelled as in config.json.
        token: Hub token; None uses the stored one.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept; None is huggingface_hub's cache.
        local_files_only: never use the network.

    Returns:
        The model, and its tokenizer, or None where the folder has no tokenizer.json.

    Raises:
        ValueError: an argument that cannot be.
        ModuleNotFoundError: load_in_4bit without bitsandbytes.
        FileNotFoundError: no such folder, repository, or file in it.
        PermissionError: a gated repository.
        CheckpointError: files that are there and wrong; all problems at once.
    """
    _check_arguments(max_seq_length, dtype, load_in_4bit, device, rope_scaling)
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    name, adapter_folder = os.fspath(model_name), None
    folder = find_folder(name, revision=revision, **hub)
    if _is_adapter(folder):
        name, base_revision = _base_of(folder)
        folder, adapter_folder = find_folder(name, revision=base_revision, **hub), folder
    tokenizer = _tokenizer(folder, adapter_folder)
    config, base = read_base(
        folder,
        dtype=None if dtype == "auto" else _as_dtype(dtype),
        device=_as_device(device),
        rope_scaling=rope_scaling,
        quantize=load_in_4bit,
    )
    spec = Spec(
        config=config,
        name_or_path=name,
        max_seq_length=max_seq_length or config.max_position_embeddings,
    )
    model = Model(spec=spec, base=base, adapter=None)
    return (model if adapter_folder is None else load_adapter(model, adapter_folder)), tokenizer


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _base_of(adapter_folder: Path) -> tuple[str, str | None]:
    """Name and revision of the base that an adapter was trained on."""
    path = adapter_folder / "adapter_config.json"
    raw = read_json(path)
    name, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise CheckpointError(
            f"{path} does not say what its base is: base_model_name_or_path is {name!r}, revision "
            f"{revision!r}. Load the base, then fastlora.load_adapter(model, folder)."
        )
    if not _is_name(name):
        raise CheckpointError(
            f"{path}: base_model_name_or_path is {name!r:.200}, which is no name of a folder or a "
            "repository. Load the base, then fastlora.load_adapter(model, folder)."
        )
    return name, revision


def _is_name(name: str) -> bool:
    """Whether the system can be asked for it: it raises for text that is none, and long names."""
    path = name.encode(errors="replace")
    return path.decode() == name and len(path) < 4096 and max(map(len, path.split(b"/"))) <= 255


def _tokenizer(folder: Path, adapter_folder: Path | None) -> Tokenizer | None:
    """The adapter's own, which may have grown a chat template, before the base's."""
    own = adapter_folder and Tokenizer.from_folder(adapter_folder, config_folder=folder)
    return own or Tokenizer.from_folder(folder)


# ── arguments ─────────────────────────────────────────────────────────────────────────────
_DTYPE_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())


def _check_arguments(
    max_seq_length: Any, dtype: Any, load_in_4bit: Any, device: Any, rope_scaling: Any
) -> None:
    problems = []
    if max_seq_length is not None and (type(max_seq_length) is not int or max_seq_length < 1):
        problems.append(f"max_seq_length={max_seq_length!r}: expected a positive integer or None")
    if dtype != "auto" and _as_dtype(dtype) is None:
        names = ", ".join(_DTYPE_NAMES)
        problems.append(f"dtype={dtype!r}: expected 'auto', a torch dtype or its name: {names}")
    if type(load_in_4bit) is not bool:
        problems.append(f"load_in_4bit={load_in_4bit!r}: expected True or False")
    try:
        _as_device(device)
    except ValueError as error:
        problems.append(str(error))
    if rope_scaling is not None and not isinstance(rope_scaling, dict):
        problems.append(f"rope_scaling={rope_scaling!r}: expected a dict with rope_type, factor, …")
    raise_problems(ValueError, "load was given:", problems)


def _as_dtype(dtype: Any) -> torch.dtype | None:
    if isinstance(dtype, str):
        return getattr(torch, dtype) if dtype in _DTYPE_NAMES else None
    return dtype if dtype in DTYPES.values() else None


def _as_device(device: Any) -> torch.device:
    """Raises ValueError where the device is neither the CPU nor a CUDA device of this machine."""
    cuda = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: expected 'auto', 'cpu' or 'cuda[:n]'") from error
    if wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: fastlora runs on 'cpu' and 'cuda'")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices" if cuda else "no CUDA device"
        raise ValueError(f"device={device!r}: torch finds {found} on this machine")
    return wanted
