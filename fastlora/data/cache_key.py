"""cache_key(): a name for everything that encoded rows depend on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fastlora.data.sources import Source
from fastlora.text.tokenizer import Tokenizer

# The folders whose code turns rows into token ids.
_CODE = ("data", "text")


def cache_key(
    sources: Sequence[Source], tokenizer: Tokenizer, settings: Mapping[str, Any]
) -> str | None:
    """32 hexadecimal digits; None if the rows of a source can be read only once.

    The key depends on the content of every file (all of it is read), on lists of dicts, on the
    fingerprint of a Hugging Face data set, on the tokenizer's files, chat templates and variables,
    on the settings, and on the code of this package. If a template writes the date, it depends on
    today's.
    """
    data = [_identity(source) for source in sources]
    if None in data:
        return None
    templates = {name: template.text for name, template in tokenizer.chat_templates.items()}
    content = {
        "data": data,
        "settings": settings,
        "tokenizer": {name: _digest(data) for name, data in sorted(tokenizer.files.items())},
        "templates": templates,
        "template_kwargs": tokenizer.template_kwargs,
        "special tokens": [dict(tokenizer.special_tokens), tokenizer.eos_token_ids],
        "encodes special tokens": tokenizer.backend.encode_special_tokens,
        "tokenizers": metadata.version("tokenizers"),
        "code": _code_digest(),
    }
    if any("strftime_now" in text for text in templates.values()):
        content["date"] = date.today().isoformat()
    return _digest(json.dumps(content, sort_keys=True).encode())[:32]


def _identity(source: Source) -> Any:
    """What tells the rows of a source from others; None if nothing does."""
    if source.files:
        # The paths too, because the counts of rows that are left out name them.
        files = [(str(file), _file_digest(file)) for file in source.files]
        return None if any(digest is None for _, digest in files) else [source.name, files]
    rows = source.iterable
    fingerprint = getattr(rows, "_fingerprint", None)
    if isinstance(fingerprint, str) and hasattr(rows, "features"):
        return [source.name, fingerprint]
    if isinstance(rows, list | tuple):
        digest = _rows_digest(rows)
        return None if digest is None else [source.name, digest]
    return None


def _file_digest(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:  # reading its rows will say why
        return None


def _rows_digest(rows: Sequence[Any]) -> str | None:
    digest = hashlib.sha256()
    try:
        for row in rows:
            digest.update(json.dumps(row).encode() + b"\n")
    except (TypeError, ValueError, RecursionError):  # a value that JSON does not have
        return None
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for folder in _CODE:
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
