"""The tensors of a checkpoint's folder, found and compared with the model's from headers alone.

scan                name -> entry, for one file or shards with an index
resolve_tied_head   whether embedding and head are one matrix
check_entries       every difference from what the model needs, in one error
"""

from collections.abc import Iterable, Mapping
from operator import itemgetter
from pathlib import Path

import torch

from fastlora.checkpoints.tensors import (
    DTYPES,
    INDEX,
    WEIGHTS,
    Entry,
    read_entries,
    read_header,
    read_index,
)
from fastlora.errors import CheckpointError, raise_problems
from fastlora.models.names import EMBED_TOKENS, LM_HEAD
from fastlora.models.wrapped_names import text_name


def scan(folder: Path, *, wrapped: bool = False) -> dict[str, Entry]:
    """Name -> entry, for every tensor of a folder. Reads headers only.

    With `wrapped`, the folder holds a text model beside a vision tower, whose tensors are left out.

    Names are those of `names.base_tensors`: the keys of a model without a head (transformers'
    LlamaModel) get the prefix "model.". `rotary_emb.inv_freq`, which old Llamas stored, is left out
    because it is computed from the config.

    Raises:
        FileNotFoundError: the folder has no weights, or lacks a shard that its index names.
        CheckpointError: a file is broken, or shards and index disagree.
    """
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for path, listed in _weight_files(folder).items():
        try:
            header = {k: e for k, e in read_header(path).items() if not _is_computed(k)}
        except CheckpointError as error:
            # The other files are read nevertheless, so that one error names all broken ones.
            problems.append(str(error))
            continue
        if listed is not None:
            problems += [
                f"{k}: not in {path.name}, where {INDEX} has it" for k in listed - header.keys()
            ]
            problems += [
                f"{k}: in {path.name}, where {INDEX} has not" for k in header.keys() - listed
            ]
        for key, entry in header.items():
            name = text_name(key) if wrapped else key
            if name is None:
                continue
            name = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
            if name in entries:
                problems.append(
                    f"{name}: stored twice, in {entries[name].path.name} and {path.name}"
                )
            entries[name] = entry
    raise_problems(CheckpointError, f"{folder} cannot be read:", sorted(problems))
    return entries


def _is_computed(key: str) -> bool:
    """Whether a tensor is computed from the config and not read."""
    return key.endswith("rotary_emb.inv_freq")


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """File -> the keys that the index says it holds; None for the only file of a folder.

    If the folder has both model.safetensors and an index, the index is ignored, as in transformers.
    """
    if (path := folder / WEIGHTS).is_file():
        return {path: None}
    if not (folder / INDEX).is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}"
            + (f"; {pickles} are pickles, which can run code: convert them." if pickles else ".")
        )
    keys: dict[Path, set[str]] = {}
    # By file name, so that reads and errors do not depend on the order of the index.
    for key, file in sorted(read_index(folder / INDEX).items(), key=itemgetter(1)):
        keys.setdefault(folder / file, set()).update([] if _is_computed(key) else [key])
    # Report missing shards together: a checkpoint of 405B has 191.
    if missing := [path.name for path in keys if not path.is_file()]:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing[:10])}{more}, which {INDEX} names; copy or download"
            " again."
        )
    return {**keys}


def resolve_tied_head(entries: dict[str, Entry], tied: bool) -> tuple[dict[str, Entry], bool]:
    """Decide whether a model's head is tied to its embedding. Returns (entries, tied).

    If the config says `tied` and a head is stored nevertheless, its values decide, as in
    transformers 5 (modeling_utils.py:2571):

        embedding only        ->  unchanged, tied
        head only             ->  the head's entry under the embedding's name, tied
        both, equal           ->  the head's entry dropped, tied
        both, different       ->  unchanged, not tied
    """
    if not tied or LM_HEAD not in entries:
        return entries, tied
    rest = {name: entry for name, entry in entries.items() if name != LM_HEAD}
    if EMBED_TOKENS not in entries:
        return rest | {EMBED_TOKENS: entries[LM_HEAD]}, True
    equal = _same_bytes(entries[EMBED_TOKENS], entries[LM_HEAD])
    return (rest, True) if equal else (entries, False)


def _same_bytes(a: Entry, b: Entry) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    # As bytes, because NaN is not equal to itself as a number.
    tensors = read_entries({"a": a, "b": b}).values()  # memory-mapped: no copies
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in tensors))


def check_entries(
    folder: Path,
    entries: Mapping[str, Entry],
    expected: Mapping[str, tuple[int, ...]],
    more: Iterable[str] = (),
) -> None:
    """Compare names, shapes and dtypes of stored tensors with the model's.

    Args:
        folder: for the message.
        entries: the stored tensors.
        expected: name -> shape, of all tensors of the model.
        more: problems that the caller has found, reported with the others.

    Raises:
        CheckpointError: lists every difference. A missing tensor is never initialised instead.
    """
    shown = lambda name: f"{entries[name].key} in {entries[name].path.name}"
    problems = [f"missing     {n} {shape}" for n, shape in expected.items() if n not in entries]
    problems += [
        f"unexpected  {shown(n)} {e.shape}" for n, e in entries.items() if n not in expected
    ]
    problems += [
        f"shape       {shown(n)}: file has {e.shape}, model needs {expected[n]}"
        for n, e in entries.items()
        if n in expected and e.shape != expected[n]
    ]
    problems += [
        f"dtype       {shown(n)}: file has {e.dtype}, expected one of {', '.join(DTYPES)}"
        for n, e in entries.items()
        if n in expected and e.dtype not in DTYPES
    ]
    cure = "If the weights are right, check that config.json comes from the same folder."
    heading = f"{folder} does not fit this model:"
    raise_problems(CheckpointError, heading, [*problems, *more], cure)
