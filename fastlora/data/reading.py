"""read_examples(): rows of all sources of an argument, read, encoded and mixed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from tqdm import tqdm

from fastlora.arguments import check_arguments, whole_number
from fastlora.data.cache import Encoded, read_cache, write_cache
from fastlora.data.cache_key import cache_key
from fastlora.data.encoding import RowEncoder, RowLimits
from fastlora.data.examples import Example, TrainOn
from fastlora.data.left_out import LeftOut
from fastlora.data.mixing import mix, quotas
from fastlora.data.row_chunks import chunked
from fastlora.data.row_steps import row_context
from fastlora.data.rows import no_rows
from fastlora.data.sources import Data, Source, sources_of
from fastlora.text.tokenizer import Tokenizer


def read_examples(
    data: Data,
    tokenizer: Tokenizer,
    limits: RowLimits,
    *,
    name: str = "data",
    train_on: TrainOn = "responses",
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[list[Example], LeftOut]:
    """The examples of all sources in order, and counts of what was left out of them.

    Rows are read and encoded in chunks, so that only the examples are held in memory. Encoded rows
    are cached (cache.py); a second run with the same data and settings maps them into memory.

    Args:
        data: see `sources_of`.
        tokenizer: the model's.
        limits: see `encode_rows`.
        name: of the argument, for messages.
        train_on: see `encode_rows`.
        columns: standard name -> name in the data; see `row_forms.standard_row`.
        seed: of the samples that weights ask for.
        progress: show a bar on stderr with rows and tokens.

    Raises:
        FileNotFoundError, ModuleNotFoundError, CheckpointError, ValueError: as `read_rows` and
            `encode_rows`; ValueError also if no row is left of the data, or of a source with a
            weight.
    """
    length = limits.max_seq_length
    check_arguments("read_examples", max_seq_length=(length, whole_number(2)))
    sources = sources_of(data, name)
    context = row_context(tokenizer, train_on)
    settings = {"limits": limits, "train_on": train_on, "columns": columns, "name": name}
    key = cache_key(sources, tokenizer, settings)
    encoded = None if key is None else read_cache(key, name)
    with closing(RowEncoder(context, limits, LeftOut(name), columns)) as encoder:
        if encoded is None:
            encoded = _encode(sources, encoder, name, progress)
            if key is not None:
                write_cache(key, encoded)
        else:
            encoder.chats = encoded.chats
            encoder.warn()
    parts, left_out = encoded.parts, encoded.left_out
    # Of a mixture, each source must have its share.
    weighted = sources[0].weight is not None
    if not any(parts) or (weighted and not all(parts)):
        lines = left_out.lines()
        raise ValueError("\n".join([f"{name} has a source of which no row is left:", *lines]))
    if not weighted:
        return [example for part in parts for example in part], left_out
    weights = [source.weight or 0.0 for source in sources]
    left_out.notes += _notes(sources, parts, quotas(parts, weights))
    return mix(parts, weights, seed=seed), left_out


def _encode(sources: Sequence[Source], encoder: RowEncoder, name: str, progress: bool) -> Encoded:
    """The examples of all sources, read and encoded."""
    left_out, parts = encoder.left_out, []
    with _bar(sources, name, progress) as bar:
        for source in sources:
            before = left_out.read
            stream = source.rows(skip_unreadable=encoder.limits.on_bad_row == "skip")
            parts.append(list(_watched(encoder, stream, bar)))
            if left_out.read == before:
                raise no_rows(source.name)
    encoder.finish()
    return Encoded(parts, left_out, encoder.chats)


def _bar(sources: Sequence[Source], name: str, progress: bool) -> Any:
    counts = [source.count for source in sources]
    total = None if None in counts else sum(count or 0 for count in counts)
    return tqdm(total=total, desc=f"encoding {name}", unit="row", disable=not progress)


def _watched(encoder: RowEncoder, stream: Iterator[Any], bar: Any) -> Iterator[Example]:
    """The examples of a stream of rows; moves the bar."""
    tokens, before = 0, encoder.left_out.read
    for examples in encoder.chunks(chunked(stream)):
        yield from examples
        tokens += sum(len(example.input_ids) for example in examples)
        bar.set_postfix({"tokens": f"{tokens:,}"}, refresh=False)
        bar.update(encoder.left_out.read - before)
        before = encoder.left_out.read


def _notes(
    sources: Sequence[Source], parts: Sequence[Sequence[Example]], counts: Sequence[int]
) -> list[str]:
    """One line for each source of a mixture: its examples, and how many an epoch has."""
    total = sum(counts)
    return [
        f"  {source.name}: {count:,} examples an epoch ({count / total:.1%}), from {len(part):,}"
        for source, part, count in zip(sources, parts, counts, strict=True)
    ]
