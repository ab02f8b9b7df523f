"""Ranks that are killed, hang, raise or disagree."""

import json
import signal

import pytest
import torch

RUN = dict(batch_size=1, gradient_accumulation_steps=2)


@pytest.fixture(scope="module")
def whole(gang) -> tuple:
    """(what rank 0 returned, the folder of the jobs) of a run that nobody killed."""
    answer = gang("killed_run", 2, step=0, rank=0, out="whole", **RUN)
    assert not any(r["exit"] for r in answer["ranks"]), answer["ranks"][0]["text"]
    return answer["ranks"][0]["result"], answer["scratch"]


KILLS = [(1, 1), (2, 0), (5, 1), (8, 1), (9, 0)]  # (step, rank); checkpoints are of even steps


@pytest.mark.parametrize(("step", "rank"), KILLS)
def test_a_killed_rank_resumes_to_the_same_bits(gang, whole, step, rank):
    out = f"killed-{step}-{rank}"
    given = dict(scratch=whole[1], restarts=1, patience=0.2)
    answer = gang("killed_run", 2, step=step, rank=rank, out=out, **given, **RUN)
    assert answer["attempts"] == 2
    for found in answer["ranks"]:
        assert found["exit"] == 0, found["text"]
        assert found["result"]["bits"] == whole[0]["bits"]
        assert found["result"]["losses"] == whole[0]["losses"]


# 2 ranks with 1 sequence have micro-batches of 2, so 4 ranks share 4 pieces of a step, 3 ranks
# have 2, 1 and 1, and a process alone cuts each micro-batch into two.
@pytest.mark.parametrize("ranks", [4, 3, 1])
def test_another_number_of_ranks_goes_on_with_the_same_run(gang, whole, ranks):
    expected, folder = whole
    source = str(folder / "whole/checkpoint-4")
    given = dict(out=f"on-{ranks}", resume=source, scratch=folder)
    answer = gang("killed_run", ranks, step=0, rank=0, **given, **RUN)
    assert not any(r["exit"] for r in answer["ranks"]), answer["ranks"][0]["text"]
    found = answer["ranks"][0]["result"]
    assert found["tokens"] == expected["tokens"]
    want, got = (torch.load(folder / f"{name}.pt") for name in ("whole", given["out"]))
    assert 0 < (want - got).abs().max() < 1e-5 or ranks == 1


def test_a_run_with_another_batch_size_is_refused(gang, whole):
    given = dict(out="other", resume=str(whole[1] / "whole/checkpoint-4"), scratch=whole[1])
    answer = gang("killed_run", 2, step=0, rank=0, **given, **(RUN | dict(batch_size=3)))
    for found in answer["ranks"]:
        assert found["exit"] and "batch_size: 2 there, 6 now" in found["text"]


FACTS = ["hash of the training data", "hash of eval_data", "learning_rate", "spec.kernels"]
FACTS += ["hash of the base model", "version of torch", "hash of the adapter"]


def test_a_difference_stops_all_ranks_and_is_named(results):
    for errors in results("disagreeing", 2, facts=FACTS):
        assert errors.keys() == {*FACTS}
        for fact, text in errors.items():
            assert f"rank 1 has another {fact}: " in text, text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named(results, rank):
    texts = results("hanging", 2, rank=rank)
    assert texts[1 - rank].startswith(f"TimeoutError: rank {rank} (process ")
    # It wakes up after the other has gone, perhaps with the store.
    assert "stopped, so this rank" in texts[rank] or "lost the connection" in texts[rank]


def test_ranks_that_torchrun_starts_again_do_not_meet_the_dead_ones(results):
    assert results("restarts", 2) == [[2.0, 2.0]] * 2


def test_a_rank_that_does_not_come_is_named(results):
    first, _ = results("absent", 2)
    assert first.startswith("rank 1 did not come to fastlora.train")


def test_an_error_on_one_rank_stops_the_others_with_its_reason(results):
    first, second = results("raising", 2)
    assert first[0].startswith("KeyError") and second[1].startswith("FileNotFoundError")
    assert "rank 0 (process" in second[0] and "KeyError" in second[0]
    assert "rank 1 (process" in first[1] and "missing.jsonl" in first[1]


def test_a_loss_that_is_nan_on_one_rank_stops_all_alike(results):
    first, second = results("not_finite", 2)
    assert first == second and "the loss is nan" in first


def test_a_gradient_that_overflows_on_one_rank_is_taken_again_on_all(results):
    """Every pass over a sharded base needs all ranks."""
    assert results("rescaled", 2) == [[1.0, 2.0**-6]] * 2


def test_a_signal_to_one_rank_ends_all_after_the_same_step(gang):
    answer = gang("signalled", 2)
    stops = [rank["result"] for rank in answer["ranks"]]
    assert stops[0] == stops[1] and stops[0]["code"] == 128 + signal.SIGTERM
    saved = [path.name for path in (answer["scratch"] / "stopped").iterdir()]
    assert saved == [f"checkpoint-{stops[0]['steps']}"]


def test_an_update_that_differs_on_a_rank_is_found(results):
    for text in results("drifting", 2):
        assert text.startswith("the last update of rank 1 (process")


def test_one_rank_writes(gang):
    answer = gang("samples", 2, out="run")
    first, second = (rank["result"] for rank in answer["ranks"])
    assert first == second, answer["ranks"][0]["text"]
    assert first["steps"] == 6  # nothing changes, so the third evaluation ends the run
    lines = (answer["scratch"] / "run/log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records] == list(range(1, first["steps"] + 1))
    assert {r["ranks"] for r in records} == {2} and "samples" in records[1]
    bars = [rank["text"].count("step/s") for rank in answer["ranks"]]
    assert bars[1] == 0
