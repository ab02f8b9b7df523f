"""The files of a Hugging Face folder that describe its tokenizer: read, checked and extended."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Backend
from tokenizers import models

from fastlora.checkpoints.file_bytes import read_bytes
from fastlora.errors import CheckpointError, raise_problems
from fastlora.text.backend import (
    REBUILT_CLASSES,
    backend_errors,
    is_rebuilt,
    make_backend,
    tokenizer_class,
)
from fastlora.text.chat_template import ChatTemplate
from fastlora.text.special_tokens import (
    add_special_tokens,
    find_eos_token_ids,
    read_special_tokens,
    token_flags,
)
from fastlora.text.tokenizer_json import tokenizer_json_problems

_MAX_TOKENIZER_BYTES = 128 * 2**20  # Gemma 3's tokenizer.json has 33 MB
_MAX_OTHER_BYTES = 32 * 2**20  # a tokenizer_config.json that lists all added tokens has 1 MB
# The sandbox refuses templates of more than 200,000 characters when a chat is rendered. Up to this
# size such a folder still loads, because plain text needs no template.
_MAX_TEMPLATE_BYTES = 2**20

# Encoded and decoded once, so that an error of the library shows before any use.
_PROBES = ("", "a", " The rank of 12 matrices,\n\n\tit's naïve 日本 🙂 \u0301\x00")


class TokenizerParts(NamedTuple):
    """The fields of `Tokenizer`, which explains them."""

    backend: Backend
    special_tokens: Mapping[str, str]
    eos_token_ids: tuple[int, ...]
    chat_templates: Mapping[str, ChatTemplate]
    clean_up_spaces: bool
    files: Mapping[str, bytes]


def tokenizer_files(folder: Path) -> list[Path]:
    """Every file of `folder` that affects its tokenizer, in a fixed order."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    names += ("added_tokens.json", "chat_template.jinja")
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return [path for name in names if (path := folder / name).is_file()] + more


def check_output_folder(folder: Path) -> None:
    """Refuse a folder into which a tokenizer must not, or cannot, be saved. Changes nothing.

    Raises:
        ValueError: additional_chat_templates there is a file, or a link: writing and deleting
            templates would change files of the folder that it leads to.
    """
    templates = folder / "additional_chat_templates"
    if templates.is_symlink() or (templates.exists() and not templates.is_dir()):
        kind = "a link to another place" if templates.is_symlink() else "a file"
        raise ValueError(
            f"{templates} is {kind}; expected a folder or nothing. Delete it, or choose another"
            " folder for the tokenizer."
        )


def read_tokenizer_files(folder: Path, config_folder: Path) -> TokenizerParts:
    """The parts of a folder's tokenizer.

    Args:
        folder: has a tokenizer.json.
        config_folder: where config.json and generation_config.json are, if there are any.

    Raises:
        CheckpointError: a file is unreadable or has wrong contents.
    """
    files, configs = _read_all(folder, config_folder)
    parsed = _parse(folder, {**files, **configs})
    settings = parsed.get("tokenizer_config.json", {})
    class_name = _class_name(folder, parsed, files["tokenizer.json"])
    raw, path = parsed["tokenizer.json"], folder / "tokenizer.json"
    raise_problems(
        CheckpointError,
        f"{path} would end the process, or give other ids on every call:",
        tokenizer_json_problems(raw, model_is_rebuilt=is_rebuilt(class_name, raw)),
        "Download it again, or use another tokenizer.",
    )
    not_read = f"{path} is not a tokenizer that the tokenizers library reads (is it cut off?)"
    with backend_errors(not_read):
        backend = make_backend(class_name, files["tokenizer.json"], raw, settings)
    padding = raw.get("padding") or {}
    defaults = {"pad_token": padding.get("pad_token"), **REBUILT_CLASSES.get(class_name, {})}
    special = read_special_tokens(folder, parsed, defaults)
    with backend_errors(f"{path} and the files beside it: the tokenizers library fails with them"):
        add_special_tokens(backend, special, all_special=class_name == "Qwen2Tokenizer")
        backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
        for text in _PROBES:
            # A plain Exception is about this text, such as a word that a small vocabulary lacks.
            with suppress(Exception):
                backend.decode(backend.encode(text).ids)
    named = {name: str(token) for name, token in special.named.items()}
    return TokenizerParts(
        backend=backend,
        special_tokens=named,
        eos_token_ids=find_eos_token_ids(folder, parsed, backend, named.get("eos_token")),
        chat_templates=_chat_templates(folder, files, settings),
        clean_up_spaces=_cleans_up(backend, settings),
        files=_with_class(files, settings, class_name),
    )


def _read_all(folder: Path, config_folder: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Contents by name: of the tokenizer's files, and of the two configuration files."""
    # Apart, because the model's two files are not saved with the tokenizer.
    files, configs, problems = {}, {}, []
    paths = [(files, p.relative_to(folder).as_posix(), p) for p in tokenizer_files(folder)]
    paths += [
        (configs, name, config_folder / name)
        for name in ("config.json", "generation_config.json")
        if (config_folder / name).is_file()
    ]
    for contents, name, path in paths:
        longest = _MAX_TEMPLATE_BYTES if name.endswith(".jinja") else _MAX_OTHER_BYTES
        longest = _MAX_TOKENIZER_BYTES if name == "tokenizer.json" else longest
        try:
            contents[name] = read_bytes(path, longest)
        except CheckpointError as error:
            problems.append(str(error))
    raise_problems(CheckpointError, f"{folder} has files that cannot be read:", problems)
    return files, configs


def with_added_tokens(files: Mapping[str, bytes], backend: Backend) -> dict[str, bytes]:
    """The files with all added tokens of `backend`, in every place where a reader looks for them.

    Tokens that came from other files are written into tokenizer.json too: readers open the other
    files later and would find the tokens' ids taken by the new ones.
    """
    entries = {
        i: token_flags(token) for i, token in sorted(backend.get_added_tokens_decoder().items())
    }
    tokenizer = json.loads(files["tokenizer.json"])
    tokenizer["added_tokens"] = [{"id": i, **entry} for i, entry in entries.items()]
    changed = {"tokenizer.json": tokenizer}
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    if settings.get("added_tokens_decoder"):
        settings["added_tokens_decoder"] = {str(i): entry for i, entry in entries.items()}
        changed["tokenizer_config.json"] = settings
    return {**files, **{name: _as_json(value) for name, value in changed.items()}}


def _as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def _parse(folder: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """File name -> dict for JSON files, text for others. Reports all unreadable files together."""
    parsed, problems = {}, []
    for name, data in files.items():
        try:
            parsed[name] = json.loads(data) if name.endswith(".json") else data.decode()
            if b"\\u" in data:  # JSON may escape half a surrogate pair, which UTF-8 does not encode
                json.dumps(parsed[name], ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
            problems.append(f"{name}: {error!s:.200}")
            continue
        if name.endswith(".json") and not isinstance(parsed[name], dict):
            problems.append(f"{name}: holds a {type(parsed[name]).__name__}, expected an object")
    raise_problems(
        CheckpointError,
        f"{folder} has files that cannot be read:",
        problems,
        "They are cut off or damaged: download them again.",
    )
    return parsed


def _class_name(folder: Path, parsed: Mapping[str, Any], tokenizer_json: bytes) -> str:
    """`backend.tokenizer_class` of a folder, after a check of the names that its files declare."""
    wrong = [
        f"{name}: tokenizer_class is {given!r:.200}, expected a name"
        for name in ("tokenizer_config.json", "config.json")
        if not isinstance(given := parsed.get(name, {}).get("tokenizer_class"), str | None)
    ]
    raise_problems(CheckpointError, f"{folder} does not name its tokenizer's class:", wrong)
    settings, config = (parsed.get(n, {}) for n in ("tokenizer_config.json", "config.json"))
    return tokenizer_class(settings, config, _is_byte_level(tokenizer_json))


def _is_byte_level(tokenizer_json: bytes) -> bool:
    return b'"ByteLevel"' in tokenizer_json


def _with_class(
    files: Mapping[str, bytes], settings: Mapping[str, Any], class_name: str
) -> dict[str, bytes]:
    """The files, with a class that only config.json declares written to tokenizer_config.json.

    An adapter's folder has no config.json; transformers must choose the same class there.
    """
    if class_name == tokenizer_class(settings, {}, _is_byte_level(files["tokenizer.json"])):
        return dict(files)
    return {
        **files,
        "tokenizer_config.json": _as_json({**settings, "tokenizer_class": class_name}),
    }


def _chat_templates(
    folder: Path, files: Mapping[str, bytes], settings: Mapping[str, Any]
) -> dict[str, ChatTemplate]:
    """Templates by name: those of the .jinja files, else those in tokenizer_config.json."""
    templates = {}
    for name, data in files.items():
        if name.endswith(".jinja"):
            # additional_chat_templates/tool_use.jinja is the template "tool_use".
            key = "default" if name == "chat_template.jinja" else Path(name).stem
            # Universal newlines, as when Python opens a file as text.
            text = data.decode().replace("\r\n", "\n").replace("\r", "\n")
            templates[key] = ChatTemplate(text, str(folder / name))
    if templates:
        return templates
    given = settings.get("chat_template")
    if isinstance(given, list) and all(isinstance(t, dict) for t in given):
        given = {t.get("name"): t.get("template") for t in given}
    named = given if isinstance(given, dict) else {} if given is None else {"default": given}
    source = folder / "tokenizer_config.json"
    if not all(isinstance(part, str) for item in named.items() for part in item):
        raise CheckpointError(
            f"{source}: chat_template must be a string, or a list of objects with strings under "
            f"name and template; got {given!r:.200}"
        )
    return {name: ChatTemplate(str(text), f"{source} ({name})") for name, text in named.items()}


def _cleans_up(backend: Backend, settings: Mapping[str, Any]) -> bool:
    """Whether decoded text is cleaned up, which is right for word-level vocabularies.

    BPE text would be damaged, so there the folder has to ask for it twice.
    """
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    wanted = settings.get("clean_up_tokenization_spaces")
    is_bpe = isinstance(backend.model, models.BPE)
    return bool(wanted and (not is_bpe or settings.get(forced)))
