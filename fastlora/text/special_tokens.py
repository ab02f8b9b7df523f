"""Special and added tokens of a folder, collected from four files by transformers' rules.

tokenizer_config.json, special_tokens_map.json, added_tokens.json and tokenizer.json may all declare
tokens, and may contradict each other.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fastlora.errors import CheckpointError, raise_problems

_SPECIAL_NAMES = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


class SpecialTokens(NamedTuple):
    """The tokens that a folder declares, before they are added to a backend."""

    named: dict[str, AddedToken]  # "bos_token" -> token
    extra: list[AddedToken]  # special tokens without a name
    declared: dict[int, AddedToken]  # id -> token


def read_special_tokens(
    folder: Path, parsed: Mapping[str, Any], defaults: Mapping[str, str | None]
) -> SpecialTokens:
    """The declared tokens, by transformers' order of precedence.

    If tokenizer_config.json has an "added_tokens_decoder", the other files are ignored. Otherwise
    special_tokens_map.json overrules tokenizer_config.json, and added_tokens.json and
    tokenizer.json add tokens.

    Args:
        folder: for error messages.
        parsed: file name -> parsed JSON.
        defaults: special tokens of a folder that names none: "bos_token" -> token or None.

    Raises:
        CheckpointError: a token that is neither text nor an object with text under "content".
    """
    settings = parsed.get("tokenizer_config.json", {})
    complete = "added_tokens_decoder" in settings
    if not complete:
        settings = {**settings, **_special_tokens_map(settings, parsed)}
    problems: list[str] = []
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = {name: settings.get(name, defaults.get(name)) for name in _SPECIAL_NAMES}
    named |= {
        k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str | dict)
    }
    if isinstance(extra, dict):
        named, extra = {**named, **extra}, []
    if not isinstance(extra, list):
        problems.append(f"extra_special_tokens: {extra!r:.200}")
        extra = []
    named = {k: _token(v, k, problems, special=True) for k, v in named.items() if v is not None}
    extra = [_token(v, "extra_special_tokens", problems, special=True) for v in extra]
    special = {t.content for t in (*named.values(), *extra)}
    declared = _declared_tokens(parsed, complete, special, problems)
    raise_problems(
        CheckpointError,
        f"{folder}: {_named_in(parsed)}: special tokens that are neither text nor an added token:",
        problems,
        "Expected a string or an object with a string under content.",
    )
    # A declared token has flags, such as lstrip, which a bare name lacks.
    by_content = {token.content: token for token in declared.values()}
    named = {name: by_content.get(token.content, token) for name, token in named.items()}
    return SpecialTokens(named, extra, declared)


def _named_in(parsed: Mapping[str, Any]) -> str:
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return ", ".join(name for name in names if name in parsed)


def _special_tokens_map(settings: Mapping[str, Any], parsed: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json; without its nameless tokens if tokenizer_config.json has some."""
    tokens = dict(parsed.get("special_tokens_map.json", {}))
    if {"extra_special_tokens", "additional_special_tokens"} & settings.keys():
        tokens.pop("additional_special_tokens", None)
    return tokens


def _declared_tokens(
    parsed: Mapping[str, Any], complete: bool, special: set[str], problems: list[str]
) -> dict[int, AddedToken]:
    """Added tokens by id, from tokenizer_config.json or else from the two older files."""
    if complete:
        entries = parsed["tokenizer_config.json"]["added_tokens_decoder"]
        source = "tokenizer_config.json: added_tokens_decoder"
    else:
        contents = parsed.get("added_tokens.json", {})
        flags = {t: {"normalized": t not in special, "special": t in special} for t in contents}
        pairs = [(str(i), {"content": t, **flags[t]}) for t, i in contents.items()]
        added = parsed["tokenizer.json"].get("added_tokens") or []
        pairs += [(str(t["id"]), t) for t in added if isinstance(t, dict) and "id" in t]
        entries, source = dict(pairs), "added_tokens.json"
    # Ids have 32 bits, so at most 10 digits. int() alone would accept "1_0" and digits of other
    # scripts, too.
    is_id = re.compile("[0-9]{1,10}").fullmatch
    if not isinstance(entries, dict) or not all(is_id(i) for i in entries):
        problems.append(f"{source}: ids must be whole numbers; got {entries!r:.200}")
        return {}
    return {int(i): _token(token, f"{source}, {i}", problems) for i, token in entries.items()}


def _token(value: Any, source: str, problems: list[str], special: bool = False) -> AddedToken:
    """An added token from its content or its JSON object. Anything else adds to `problems`."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    if not (isinstance(value, dict) and isinstance(value.get("content"), str)):
        problems.append(f"{source}: {value!r:.200}")
        return AddedToken("", special=special)
    flags = {k: value[k] for k in _FLAGS if k in value}
    if wrong := [k for k, v in flags.items() if type(v) is not bool]:
        problems.append(f"{source}: {', '.join(wrong)} must be true or false; got {value!r:.200}")
        return AddedToken("", special=special)
    token = AddedToken(value["content"], **flags)
    token.special = token.special or special
    return token


def token_flags(token: AddedToken) -> dict[str, Any]:
    """The JSON object of an added token, without its id."""
    return {name: getattr(token, name) for name in ("content", *_FLAGS)}


def add_special_tokens(backend: Backend, tokens: SpecialTokens, all_special: bool) -> None:
    """Add tokens to a new `backend`, in place: the declared ones by id, then the remaining ones.

    A token that is not in the vocabulary gets the next free id, even if another was declared.

    Args:
        backend: changed.
        tokens: of `read_special_tokens`.
        all_special: mark all of them as special, as transformers' Qwen2Tokenizer does.
    """
    names = {token.content for token in tokens.named.values()}
    known = {t.content for t in backend.get_added_tokens_decoder().values()}
    known |= {t.content for t in tokens.declared.values()}
    special = [*tokens.named.values(), *tokens.extra]
    # By id, because the library numbers new tokens in the order in which they are added.
    declared = [token for _, token in sorted(tokens.declared.items())]
    for token in declared:
        token.special = token.special or token.content in names
    backend.add_tokens(declared + [token for token in special if token.content not in known])
    if all_special:
        backend.add_tokens([AddedToken(t.content, special=True) for t in special])


def find_eos_token_ids(
    folder: Path, parsed: Mapping[str, Any], backend: Backend, eos_token: str | None
) -> tuple[int, ...]:
    """All ids that end a text: the tokenizer's first, then those of the two configuration files.

    Raises:
        CheckpointError: an eos_token_id that is not an integer or a list of integers.
    """
    eos_id = None if eos_token is None else backend.token_to_id(eos_token)
    ids = [] if eos_id is None else [eos_id]
    problems = []
    for name in ("generation_config.json", "config.json"):
        given = parsed.get(name, {}).get("eos_token_id")
        listed = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(i) is int for i in listed):
            problems.append(
                f"{name}: eos_token_id is {given!r:.200}, expected an integer or a list of them"
            )
        ids += listed
    raise_problems(CheckpointError, f"{folder} has wrong end-of-text ids:", problems)
    return tuple(dict.fromkeys(ids))
