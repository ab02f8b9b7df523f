"""Many texts encoded at once, and the characters that each token covers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer as Backend

from fastlora.errors import CheckpointError
from fastlora.text.backend import backend_errors
from fastlora.text.chat_template import Span


class Encoded(NamedTuple):
    """One encoded text. The library's offsets are turned into a list only if they are asked for:
    a tuple per token takes 5 times the memory of the ids."""

    ids: list[int]
    encoding: Any  # tokenizers.Encoding

    @property
    def spans(self) -> list[Span]:
        """The characters that each token covers, without gaps."""
        return spans_without_gaps(self.encoding.offsets)

    @property
    def span_array(self) -> Int[np.ndarray, "t 2"]:
        """The same as an array, which takes a third of the time."""
        spans = np.array(self.encoding.offsets, dtype=np.int64).reshape(-1, 2)
        spans[1:, 0] = np.minimum(spans[1:, 0], spans[:-1, 1])
        spans[:1, 0] = 0
        return spans


def spans_without_gaps(offsets: Sequence[Span]) -> list[Span]:
    """The characters of each token, from the library's offsets.

    Tokens that share a character have overlapping spans. A token gets back the leading spaces that
    ByteLevel's `trim_offsets` cuts off.
    """
    spans, reached = [], 0
    for start, end in offsets:
        # start > reached: ByteLevel cut off leading spaces. start < reached: several tokens share
        # a character, such as the bytes of an emoji.
        spans.append((min(start, reached), end))
        reached = end
    return spans


def encode_texts(
    backend: Backend, texts: Sequence[str], *, add_special_tokens: bool
) -> list[Encoded | CheckpointError]:
    """Every text encoded, or the error of the library for it, in order.

    The library encodes a batch on all cores, unless TOKENIZERS_PARALLELISM=false is set.

    Args:
        backend: of a Tokenizer.
        texts: without unpaired surrogates.
        add_special_tokens: for example BOS in front.
    """
    try:
        with backend_errors("a batch of texts"):
            encodings = backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
    except CheckpointError:
        # The library does not say which text of the batch it fails with.
        return [_encode_one(backend, text, add_special_tokens) for text in texts]
    return [Encoded(encoding.ids, encoding) for encoding in encodings]


def _encode_one(backend: Backend, text: str, add_special_tokens: bool) -> Encoded | CheckpointError:
    try:
        with backend_errors(f"the tokenizer cannot encode {text!r:.80}"):
            encoding = backend.encode(text, add_special_tokens=add_special_tokens)
    except CheckpointError as error:
        return error
    return Encoded(encoding.ids, encoding)
