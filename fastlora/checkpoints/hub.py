"""The Hugging Face Hub: a checkpoint's folder down, an adapter's folder up.

huggingface_hub is imported where it is used: 0.22 s of import time for those who never ask the Hub.
"""

import os
from collections.abc import Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from fastlora.checkpoints.tensors import INDEX, WEIGHTS, first_line, read_index

# What is fetched of a Hub repository: never a pickle, never weights of another framework.
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


# Fetched last: a folder without one of these does not load, so that an interrupted download is
# never taken for a whole folder (a tokenizer that did not arrive would be "no tokenizer").
_SEALS = ("config.json", "adapter_config.json")

DEMO = Path(__file__).parent / "demo"  # ships with the package


def find_folder(name: str, **hub: Any) -> Path:
    """The folder of what `load` was given: the demo's, or that of `resolve`, whose arguments these
    are."""
    return DEMO if name == "demo" else resolve(name, **hub)


def resolve(
    name: str | os.PathLike[str],
    *,
    files: Sequence[str] = CHECKPOINT_FILES,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint or adapter: `name` itself if it is one, else the Hub's, cached.

    Args:
        name: a local folder or a Hub id ("owner/model").
        files: names or patterns of what to fetch; of an index, its shards come with it.
        token: Hub token; None uses the one that `hf auth login` stored.
        revision: branch, tag or commit; None is "main". Ignored for a local folder.
        cache_dir: None is huggingface_hub's own cache.
        local_files_only: use the cache and ask nothing of the network.

    Raises:
        FileNotFoundError: no such folder or repository, or not in the cache while offline.
        PermissionError: the repository is gated, or the token may not read it.
        ConnectionError: the download broke off; another call resumes it.
    """
    if (folder := Path(name)).is_dir():
        return folder
    name = os.fspath(name)
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

    first = [f for f in files if f not in _SEALS]
    folder = Path(snapshot_download(name, allow_patterns=first, revision=revision, **hub))
    hub["revision"] = folder.name  # the commit: a push in between must not mix two versions
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        shards = sorted(set(read_index(folder / INDEX).values()))
        snapshot_download(name, allow_patterns=[escape(s) for s in shards], **hub)
    if seals := [f for f in files if f in _SEALS]:
        snapshot_download(name, allow_patterns=seals, **hub)
        if not any((folder / f).is_file() for f in seals):
            raise FileNotFoundError(f"the Hub repository {name!r} has no {' or '.join(seals)}.")
    return folder


@contextmanager
def _hub_errors(name: str):
    """Turns huggingface_hub's errors into Python's own, with the id and the cure."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name!r} is gated: accept its terms at https://huggingface.co/{name}, then pass "
            "token=... or run `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name!r} has no such revision: {first_line(error)}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name!r} here, and no repository of that name on the Hub; check "
            "the spelling, or pass token=... if it is private."
        ) from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(
            f"there is no folder {name!r} here, and that is no Hub id: {first_line(error)}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is not whole in the cache, and the Hub was not asked or not reached; load "
            f"it once with a connection and local_files_only=False. {first_line(error)}"
        ) from error
    except (errors.HfHubHTTPError, errors.HTTPError) as error:  # pyright: ignore
        status = getattr(getattr(error, "response", None), "status_code", None)
        kind = PermissionError if status in (401, 403) else ConnectionError
        raise kind(
            f"fetching {name!r} from the Hub failed: {first_line(error)}. What has arrived is "
            "kept; try again, with a token=... that may read it if it is private."
        ) from error


def upload(folder: Path, repo_id: str, *, token: str | None, private: bool | None) -> str:
    """Put a folder's files into a Hub repository, created if need be; gives its URL."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="LoRA adapter")
    return str(url)
