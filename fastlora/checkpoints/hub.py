"""The Hugging Face Hub: downloads of checkpoints and adapters, uploads of adapters.

huggingface_hub is imported inside functions: it takes 0.22 s, which users of local folders need not
wait for.
"""

import os
import re
from collections.abc import Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from fastlora.arguments import FLAG, PATH, Rule, instance, optional
from fastlora.checkpoints.json_text import first_line
from fastlora.checkpoints.tensors import INDEX, WEIGHTS, read_index

# Files fetched from a Hub repository: no pickles, and no weights of other frameworks.
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "adapter_config.json",
    "adapter_model.safetensors",
    INDEX,
    WEIGHTS,
)

# Fetched last. A folder without one of these does not load, so an interrupted download is not
# mistaken for a complete folder (for example one whose model has no tokenizer).
_FETCHED_LAST = ("config.json", "adapter_config.json")

DEMO = Path(__file__).parent / "demo"  # the model that the package contains


def is_file_name(name: str) -> bool:
    """Whether the file system accepts a name: UTF-8, under 4096 bytes, each part at most 255."""
    path = name.encode(errors="replace")
    return path.decode() == name and len(path) < 4096 and max(map(len, path.split(b"/"))) <= 255


FOLDER_OR_ID = Rule(
    lambda x: PATH.accepts(x) and is_file_name(os.fspath(x)), "a folder's path or a Hub id"
)

REPO_ID = Rule(
    lambda x: isinstance(x, str) and bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", x, re.ASCII)),
    "the id of a Hub repository, such as 'user/name'",
)

# Rules for the arguments of `fetch_folder` that users pass to `load` and `load_adapter`.
HUB_RULES = {
    "token": optional(instance((str, bool), "a text, True or False")),
    "revision": optional(Rule(lambda x: isinstance(x, str) and x != "", "a branch, tag or commit")),
    "cache_dir": optional(PATH),
    "local_files_only": FLAG,
}


def path_text(name: str | os.PathLike[str]) -> str:
    """A `model_name` as text. Of a path object, one that only names a folder, such as "./demo"."""
    text = os.fspath(name)
    is_plain = not isinstance(name, str) and not os.path.isabs(text) and not text.startswith(".")
    return os.path.join(".", text) if is_plain else text


def find_folder(name: str, **hub: Any) -> Path:
    """The folder for a `model_name` of `load`: the demo's for "demo", else as `fetch_folder`.

    Args:
        name: "demo", a local folder or a Hub id.
        hub: keyword arguments of `fetch_folder`.
    """
    return DEMO if name == "demo" else fetch_folder(name, **hub)


def fetch_folder(
    name: str | os.PathLike[str],
    *,
    files: Sequence[str] = CHECKPOINT_FILES,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a checkpoint or adapter, downloaded into the cache if necessary.

    Args:
        name: a local folder, which is returned unchanged, or a Hub id ("owner/model"). A path
            object is always a folder.
        files: names or patterns of files to download. With an index come the shards that it names.
        token: Hub token; None uses the one that `hf auth login` stored.
        revision: branch, tag or commit; None is "main". Ignored for a local folder.
        cache_dir: None is huggingface_hub's cache.
        local_files_only: use the cache only, never the network.

    Raises:
        FileNotFoundError: the folder or repository does not exist, or `local_files_only` is True
            and the cache does not have it.
        PermissionError: the repository is gated, or the token may not read it.
        ConnectionError: the download was interrupted; another call resumes it.
    """
    if (folder := Path(name)).is_dir():
        return folder
    name = path_text(name)
    if folder.exists():
        raise FileNotFoundError(f"{name!r} is a file; expected the folder that holds it.")
    if name.startswith((".", "~", "/")) or "\\" in name or not 1 <= name.count("/") + 1 <= 2:
        raise FileNotFoundError(f"no such folder: {name!r} (working directory {Path.cwd()}).")
    with _hub_errors(name):
        return _download(
            name,
            files,
            token=token,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )


def _download(name: str, files: Sequence[str], revision: str | None, **hub: Any) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    first = [f for f in files if f not in _FETCHED_LAST]
    folder = Path(snapshot_download(name, allow_patterns=first, revision=revision, **hub))
    # The folder's name is the commit. The next calls ask for it, because a push between two calls
    # would mix two versions.
    hub["revision"] = folder.name
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        shards = sorted(set(read_index(folder / INDEX).values()))
        snapshot_download(name, allow_patterns=[escape(s) for s in shards], **hub)
    if last := [f for f in files if f in _FETCHED_LAST]:
        snapshot_download(name, allow_patterns=last, **hub)
        if not any((folder / f).is_file() for f in last):
            raise FileNotFoundError(f"the Hub repository {name!r} has no {' or '.join(last)}.")
    return folder


@contextmanager
def _hub_errors(name: str):
    """Replace huggingface_hub's errors while a repository is fetched: see `_hub_problem`."""
    from huggingface_hub import errors  # noqa: PLC0415

    action = f"there is no folder {name!r} here, and fetching it from"
    try:
        yield
    except errors.RepositoryNotFoundError as error:
        if isinstance(error, errors.GatedRepoError):
            raise _hub_problem(error, action, name, _FETCH_CURE) from error
        raise FileNotFoundError(
            f"there is no folder {name!r} here, and no repository of that name on the Hub; check "
            "the spelling, or pass token=... if it is private."
        ) from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(
            f"there is no folder {name!r} here, and it is not a valid Hub id: {first_line(error)}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name!r} here (working directory {Path.cwd()}): check the"
            " spelling. If it is a Hub id: it is not complete in the cache, and the Hub was not"
            " asked or not reached; load it once with a connection and local_files_only=False."
            f" {first_line(error)}"
        ) from error
    except (errors.HTTPError, ConnectionError) as error:  # pyright: ignore
        raise _hub_problem(error, action, name, _FETCH_CURE) from error


@contextmanager
def _upload_errors(name: str):
    """Replace huggingface_hub's errors while files are uploaded: see `_hub_problem`."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise PermissionError(
            f"uploading {name!r} to the Hub needs a token: pass token=... or run `hf auth login`."
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"{name!r} is not a valid Hub id: {first_line(error)}") from error
    except errors.RepositoryNotFoundError as error:
        # The Hub answers so, too, if the token may not see the repository.
        raise PermissionError(
            f"uploading {name!r} to the Hub was refused: check the user's or organisation's name,"
            " and pass a token=... that may write there, or run `hf auth login`."
        ) from error
    except (errors.HTTPError, ConnectionError) as error:  # pyright: ignore
        raise _hub_problem(error, f"uploading {name!r} to", name, _UPLOAD_CURE) from error


_FETCH_CURE = (
    "The files fetched so far are kept; try again, and if the repository is private, pass a"
    " token=... that may read it."
)
_UPLOAD_CURE = "Try again; check the name, and pass a token=... that may write there."


def _hub_problem(error: Exception, action: str, name: str, cure: str) -> OSError:
    """Python's error for one of huggingface_hub's, with the Hub id and the cure.

    Args:
        error: an answer of the Hub, or no connection.
        action: for the message: "fetching 'a/b' from".
        name: the Hub id.
        cure: the message's last sentence.
    """
    from huggingface_hub import errors  # noqa: PLC0415

    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{name!r} is gated: accept its terms at https://huggingface.co/{name}, then pass "
            "token=... or run `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{name!r} has no such revision: {first_line(error)}")
    if isinstance(error, ConnectionError):  # offline mode, for example
        cure = "Connect, and unset HF_HUB_OFFLINE if it is set."
    status = getattr(getattr(error, "response", None), "status_code", None)
    kind = PermissionError if status in (401, 403) else ConnectionError
    return kind(f"{action} the Hub failed: {first_line(error)}. {cure}")


def upload(folder: Path, repo_id: str, *, token: str | None, private: bool | None) -> str:
    """Upload a folder's files to a Hub repository and return its URL.

    The repository is created if it does not exist; `private` applies only then.

    Raises:
        PermissionError: there is no token, or it may not write to the repository.
        ValueError: `repo_id` is not a Hub id.
        ConnectionError: the Hub was not reached; nothing or a part was uploaded.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415

    api = HfApi(token=token)
    with _upload_errors(repo_id):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="LoRA adapter")
    return str(url)
