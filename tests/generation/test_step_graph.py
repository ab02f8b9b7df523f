"""StepGraphs, with graphs faked on the CPU: when steps are recorded, replayed and forgotten."""

import pytest
import torch

from fastlora.generation import cache, engine, step_graph
from fastlora.generation.engine import Engine, RowSettings
from fastlora.generation.sampling import Sampling
from fastlora.generation.step_graph import StepGraphs
from oracles.pairs import adapted
from oracles.transformers_side import prompt


@pytest.fixture
def fake_graphs(monkeypatch) -> list[str]:
    """Steps as on CUDA: the first of a key on a side stream, then recorded and replayed."""
    calls: list[str] = []

    def capture(self, run, size):
        calls.append("capture" if size == 1 else f"capture {size}")  # it runs nothing
        return lambda: (calls.append("replay"), *(run() for _ in range(size)))[0]

    monkeypatch.setattr(StepGraphs, "_capture", capture)
    monkeypatch.setattr(
        StepGraphs, "_on_side_stream", lambda self, run: (calls.append("plain"), run())[1]
    )
    return calls


def test_a_step_runs_plainly_once_and_is_replayed_then(fake_graphs):
    graphs, ran = StepGraphs(torch.device("cpu"), record=True), []
    for key in ("a", "a", "a", "b", "a"):
        graphs.run(key, lambda key=key: ran.append(key))
    assert fake_graphs == ["plain", "capture", "replay", "replay", "plain", "replay"]
    assert ran == ["a", "a", "a", "b", "a"]  # every call ran one step
    graphs.clear()
    graphs.run("a", lambda: ran.append("a"))
    assert fake_graphs[-1] == "plain"


def test_the_oldest_graph_makes_room_for_another(fake_graphs, monkeypatch):
    monkeypatch.setattr(step_graph, "_MOST_STEPS", 2)
    graphs = StepGraphs(torch.device("cpu"), record=True)
    for key in "aabbcc":
        graphs.run(key, lambda: None)
    assert [*graphs.replays] == [("b", 1), ("c", 1)]
    graphs.run("a", lambda: None)  # recorded at once, because it ran before
    assert fake_graphs[-2:] == ["capture", "replay"]
    assert [*graphs.replays] == [("c", 1), ("a", 1)]


def test_several_steps_are_one_graph_once_the_gaps_took_as_long_as_its_recording(
    fake_graphs, monkeypatch
):
    monkeypatch.setattr(step_graph, "_GAP", 1.0)
    graphs, ran = StepGraphs(torch.device("cpu"), record=True), []
    run = lambda steps: graphs.run("a", lambda: ran.append(1), steps)
    graphs.seconds = 3.0
    run(16)  # after 12 replays a graph of 4 steps pays
    assert fake_graphs == ["plain", "capture", *["replay"] * 15] and len(ran) == 16
    fake_graphs.clear()
    run(3)  # too few for it
    run(16)
    run(6)
    expected = [*["replay"] * 3, "capture 4", *["replay"] * 4, *["replay"] * 3]
    assert fake_graphs == expected and len(ran) == 41
    fake_graphs.clear()
    for _ in range(7):
        run(16)  # and one of 16 after 48
    assert fake_graphs == [*["replay"] * 24, "capture 16", "replay"] and len(ran) == 153
    graphs.run("b", lambda: None, 16)  # another key has lost nothing yet
    assert not any(x.startswith("capture ") for x in fake_graphs[-17:])


def test_a_graph_of_several_steps_makes_room_for_itself(fake_graphs, monkeypatch):
    monkeypatch.setattr(step_graph, "_MOST_STEPS", 5)
    graphs = StepGraphs(torch.device("cpu"), record=True)
    for key in "aabbcc":
        graphs.run(key, lambda: None)
    graphs.seconds, graphs.lost["c"] = 1.0, 4.0
    graphs.run("c", lambda: None, 4)
    assert [*graphs.replays] == [("c", 1), ("c", 4)]


def test_a_growing_cache_and_new_kinds_of_rows_make_new_graphs(pair, fake_graphs, monkeypatch):
    """And the tokens are those without graphs."""
    model = adapted(pair("qwen2_window").model, r=4)
    monkeypatch.setattr(cache, "_FIRST_LENGTH", 8)
    monkeypatch.setattr(engine, "_can_record", lambda model: True)
    how = RowSettings(max_new_tokens=30, sampling=Sampling(temperature=1.5), seed=0, stop=())
    ids = prompt(1, 5)[0].tolist()

    def tokens() -> list[int]:
        one, got = Engine(model, slots=2, max_length=40), []
        one.admit([(ids, how)])
        while one.running:
            got += [i for new in one.advance(4) for i in new.ids]
        return got

    recorded = tokens()
    monkeypatch.setattr(engine, "_can_record", lambda model: False)
    assert recorded == tokens()
    assert fake_graphs.count("capture") >= 3  # 8, 16, 32 and 40 tokens


def test_a_capture_uses_the_memory_of_the_first(monkeypatch):
    """What torch is asked for, without CUDA."""
    pools = []

    class Graph:
        replay = staticmethod(lambda: None)
        pool = staticmethod(lambda: "the pool")

    class Capturing:
        def __init__(self, graph, pool, capture_error_mode):
            pools.append(pool)
            assert capture_error_mode == "thread_local"

        def __enter__(self): ...

        def __exit__(self, *error): ...

    monkeypatch.setattr(step_graph.torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(step_graph.torch.cuda, "graph", Capturing)
    graphs = StepGraphs(torch.device("cpu"), record=True)
    graphs.ran |= {"a", "b"}
    graphs.run("a", lambda: None)
    graphs.run("b", lambda: None)
    assert pools == [None, "the pool"] and 0 < graphs.seconds < 1
