"""weight_files."""

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


def scan(folder: Path) -> dict[str, Entry]:
    """Name -> entry for every tensor of a folder, one file or shards, from their headers.

    Names are those of `params.base_tensors`: a base model's keys get their "model." prefix. Old
    Llamas' rotary_emb.inv_freq is left out: it is computed from the config.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is not there.
        CheckpointError: a broken file, or shards and index that disagree.
    """
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for path, listed in _weight_files(folder).items():
        try:
            found = {k: e for k, e in read_header(path).items() if not _is_stale(k)}
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if listed is not None:
            problems += [
                f"{k}: not in {path.name}, where {INDEX} has it" for k in listed - found.keys()
            ]
            problems += [
                f"{k}: in {path.name}, where {INDEX} has not" for k in found.keys() - listed
            ]
        for key, entry in found.items():
            name = key if key.startswith(("model.", "lm_head.")) else f"model.{key}"
            if name in entries:
                problems.append(
                    f"{name}: stored twice, in {entries[name].path.name} and {path.name}"
                )
            entries[name] = entry
    raise_problems(CheckpointError, f"{folder} cannot be read:", sorted(problems))
    return entries


def _is_stale(key: str) -> bool:
    return key.endswith("rotary_emb.inv_freq")


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Files -> the keys an index puts there, or None; one file goes before an index, as in HF."""
    if (path := folder / WEIGHTS).is_file():
        return {path: None}
    if not (folder / INDEX).is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}"
            + (f"; {pickles} are pickles, which can run code: convert them." if pickles else ".")
        )
    keys: dict[Path, set[str]] = {}
    for key, file in sorted(read_index(folder / INDEX).items(), key=itemgetter(1)):
        keys.setdefault(folder / file, set()).update([] if _is_stale(key) else [key])
    if missing := [path.name for path in keys if not path.is_file()]:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing[:10])}{more}, which {INDEX} names; copy or download"
            " again."
        )
    return {**keys}


def resolve_tied_head(entries: dict[str, Entry], tied: bool) -> tuple[dict[str, Entry], bool]:
    """The entries of a model whose config says `tied`, and whether its head really is.

    As in transformers 5 (modeling_utils.py:2571): a stored head that equals the embedding, or that
    stands alone, is the tied matrix; one that differs from it is a head of its own.
    """
    if not tied or LM_HEAD not in entries:
        return entries, tied
    rest = {name: entry for name, entry in entries.items() if name != LM_HEAD}
    if EMBED_TOKENS not in entries:
        return rest | {EMBED_TOKENS: entries[LM_HEAD]}, True
    return (rest, True) if _same(entries[EMBED_TOKENS], entries[LM_HEAD]) else (entries, False)


def _same(a: Entry, b: Entry) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    tensors = read_entries({"a": a, "b": b}).values()  # mapped: compared without a copy
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in tensors))


def check_entries(
    folder: Path,
    entries: Mapping[str, Entry],
    expected: Mapping[str, tuple[int, ...]],
    more: Iterable[str] = (),
) -> None:
    """Compare names, shapes and dtypes with the model's; report every difference at once.

    Args:
        folder: for the message.
        entries: what the files have.
        expected: what the model needs.
        more: problems that were found already.

    Raises:
        CheckpointError: on any difference. Nothing missing is ever initialised.
    """
    at = lambda name: f"{entries[name].key} in {entries[name].path.name}"
    problems = [f"missing     {n} {shape}" for n, shape in expected.items() if n not in entries]
    problems += [f"unexpected  {at(n)} {e.shape}" for n, e in entries.items() if n not in expected]
    problems += [
        f"shape       {at(n)}: file has {e.shape}, model needs {expected[n]}"
        for n, e in entries.items()
        if n in expected and e.shape != expected[n]
    ]
    problems += [
        f"dtype       {at(n)}: file has {e.dtype}, expected one of {', '.join(DTYPES)}"
        for n, e in entries.items()
        if n in expected and e.dtype not in DTYPES
    ]
    cure = "If the weights are right, check that config.json comes from the same folder."
    heading = f"{folder} does not fit this model:"
    raise_problems(CheckpointError, heading, [*problems, *more], cure)
