"""TextStream: the streamed pieces join to the decoded text, and no character is cut."""

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from fastlora.generation.text import TextStream


class Bytes:
    """A byte-level vocabulary: one id per byte, so that é is two tokens and 🦙 four."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        raw = RawTokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        self.encode = lambda text: raw.encode(text).ids
        self.decode = raw.decode


@pytest.mark.parametrize(
    "text", ["plain", "é", "naïve café", "🦙 and 日本語", "ends in half a \N{LLAMA}"]
)
def test_streamed_pieces_join_to_the_text(text):
    tokenizer, pieces = Bytes(), []
    ids = tokenizer.encode(text)
    if text.startswith("ends"):
        ids = ids[:-2]  # cut inside the last character
    stream = TextStream(tokenizer.decode, pieces.append)
    for i in ids:
        stream(torch.tensor([i]))
    stream.finish()
    assert "".join(pieces) == tokenizer.decode(ids)
    finished = pieces[:-1] if text.startswith("ends") else pieces
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in finished)
    assert all(pieces)


def test_invalid_bytes_in_the_middle_are_streamed_too():
    tokenizer, pieces = Bytes(), []
    ids = tokenizer.encode("é")[:1] + tokenizer.encode("abc")
    stream = TextStream(tokenizer.decode, pieces.append)
    for i in ids:
        stream(torch.tensor([i]))
    stream.finish()
    assert "".join(pieces) == tokenizer.decode(ids) == "\N{REPLACEMENT CHARACTER}abc"
