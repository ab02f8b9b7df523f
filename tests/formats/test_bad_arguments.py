"""Bad arguments of load_adapter: each is refused by name, before any file is read."""

import math
import time
from typing import Any

import pytest
import torch

import fastlora

# Below the type hook that the tests may run with: its error would come first.
load_adapter = getattr(fastlora.load_adapter, "__wrapped__", fastlora.load_adapter)

FOREIGN = object()
NOT_A_PATH = (None, "", 5, 1.5, (), ["a"], b"a", "a\0b", {}, FOREIGN)
WRONG: dict[str, tuple[Any, ...]] = {
    "model": (None, "demo", 5, 1.5, (), [], {}, FOREIGN, torch.zeros(3)),
    "folder_or_id": (*NOT_A_PATH, "x" * 5000, "\ud800"),
    "token": (5, 1.5, (), ["a"], {}, FOREIGN),
    "revision": (5, 1.5, "", (), ["a"], {}, FOREIGN),
    "cache_dir": NOT_A_PATH[1:],
    "local_files_only": (None, 1, 1.5, "yes", (), [], FOREIGN),
}


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_argument_of_load_adapter_is_named_at_once(name, pair, tmp_path):
    good: dict[str, Any] = dict(model=pair("llama2").model, folder_or_id=tmp_path)
    for value in WRONG[name]:
        start = time.process_time()
        with pytest.raises((ValueError, TypeError), match=rf"\b{name}="):
            load_adapter(**good | {name: value})
        assert time.process_time() - start < 1, value


def test_the_pair_that_load_returns_is_refused_with_the_cure(pair, tmp_path):
    loaded: Any = (pair("llama2").model, None)
    with pytest.raises((ValueError, TypeError), match=r"model, tokenizer = fastlora\.load"):
        load_adapter(loaded, tmp_path)


def test_several_wrong_arguments_are_listed_together():
    model: Any = None
    with pytest.raises((ValueError, TypeError), match=r"model=(.|\n)*folder_or_id=(.|\n)*token="):
        load_adapter(model, math.nan, token=5)
