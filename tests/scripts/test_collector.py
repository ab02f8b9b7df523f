"""The garbage collector while scripts/finetune.py trains, and afterwards."""

import gc
import weakref

import pytest
from finetuning.collector import imports_kept


class Node:
    """An object in a cycle, which only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_only_new_objects_are_collected_in_the_block_and_all_after_it():
    gc.unfreeze()
    gc.disable()
    old = weakref.ref(Node())
    with pytest.raises(KeyError), imports_kept():
        assert gc.isenabled()
        new = weakref.ref(Node())
        gc.collect()
        assert new() is None and old() is not None
        raise KeyError
    assert gc.isenabled() and not gc.get_freeze_count()
    gc.collect()
    assert old() is None
