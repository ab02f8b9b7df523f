"""The collector is as before after each block."""

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from fastlora.runtime.ahead import ahead
from fastlora.runtime.garbage import collection_paused, old_objects_kept


class Node:
    """An object in a cycle, which only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    gc.unfreeze()
    yield
    assert gc.isenabled()
    gc.unfreeze()


def is_freed(make: Callable[[], Node]) -> bool:
    node = weakref.ref(make())
    gc.collect()
    return node() is None


def test_nothing_is_collected_while_a_thread_works_ahead():
    seen: list[bool] = []
    ahead([lambda: seen.append(gc.isenabled())]).wait()
    assert seen == [False]


def test_the_collector_is_enabled_again_after_an_error():
    with pytest.raises(KeyError), collection_paused():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_the_caller_disabled_stays_so():
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()
    gc.enable()


def test_only_new_objects_are_collected_in_the_first_step():
    old = weakref.ref(Node())
    with pytest.raises(KeyError), old_objects_kept():
        assert is_freed(Node)
        assert old() is not None
        raise KeyError
    gc.collect()
    assert old() is None and not gc.get_freeze_count()


def test_old_objects_are_collected_in_later_steps():
    old = weakref.ref(Node())
    with old_objects_kept(False):
        gc.collect()
    assert old() is None


def test_objects_that_the_caller_froze_stay_frozen():
    gc.freeze()
    frozen = gc.get_freeze_count()
    with old_objects_kept():
        pass
    assert 0 < gc.get_freeze_count() <= frozen
