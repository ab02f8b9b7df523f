"""N ranks with batches of b are one rank with batches of N b."""

import json

import pytest
import torch

# Name -> arguments of one rank; N ranks get batch_size / N. 20 steps of fp32.
CASES = {
    "packed": dict(
        batch_size=4, max_steps=20, gradient_accumulation_steps=2, eval_every=5, evaluates=True
    ),
    "packed, dropout": dict(batch_size=4, max_steps=20, dropout=0.2, ordered=True),
    "padded, dropout, noise": dict(
        batch_size=4, max_steps=20, packing=False, dropout=0.2, neftune_alpha=5.0
    ),
    # 20 rows in steps of 12: the second step of an epoch has 8, in two micro-batches of 4.
    "padded, last step short": dict(
        batch_size=4, max_steps=20, packing=False, gradient_accumulation_steps=3
    ),
    # 17 rows: the last step of an epoch has one row, and the other rank runs a batch that does not
    # count, because every pass over the base needs both. So it is in evaluation.
    "sharded base": dict(
        batch_size=4, max_steps=6, packing=False, kind="odd", shard=2, evaluates=True
    ),
    "stream": dict(batch_size=4, max_steps=6, kind="stream"),
}


FEWER = {name: CASES[name] for name in ("packed, dropout", "padded, last step short")}


def split(cases: dict, ranks: int) -> dict:
    return {n: c | dict(batch_size=c["batch_size"] // ranks) for n, c in cases.items()}


def largest(a: list[float], b: list[float]) -> float:
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)


@pytest.fixture(scope="module")
def alone(gang) -> tuple:
    answer = gang("runs", 1, cases=CASES)
    assert not answer["ranks"][0]["exit"], answer["ranks"][0]["text"]
    return answer["ranks"][0]["result"], answer["scratch"]


@pytest.fixture(scope="module")
def together(gang) -> dict:
    """Number of ranks -> (results of all ranks, the folder of the job)."""
    found = {}
    for ranks, cases in ((2, CASES), (4, FEWER)):
        answer = gang("runs", ranks, cases=split(cases, ranks))
        assert not any(r["exit"] for r in answer["ranks"]), answer["ranks"][-1]["text"]
        found[ranks] = [rank["result"] for rank in answer["ranks"]], answer["scratch"]
    return found


@pytest.mark.parametrize(("ranks", "name"), [*((2, n) for n in CASES), *((4, n) for n in FEWER)])
def test_n_ranks_equal_one_rank_with_n_times_the_batch(alone, together, ranks, name):
    (one, folder), (many, other) = alone, together[ranks]
    for rank in many:
        assert largest(rank[name]["losses"], one[name]["losses"]) < 1e-5
        assert largest(rank[name]["norms"][:5], one[name]["norms"][:5]) < 1e-4
        assert rank[name]["tokens"] == one[name]["tokens"]
        assert largest(rank[name]["evals"], one[name]["evals"]) < 1e-5
        assert rank[name]["bits"] == many[0][name]["bits"]
    want, got = (torch.load(path / f"{name}.pt") for path in (folder, other))
    assert (want - got).abs().max() < 1e-5


def test_two_runs_give_the_same_bits_and_pairs_are_dealt_too(results, gang):
    pairs = dict(kind="pairs", loss="dpo", max_steps=6, dropout=0.1)
    cases = {"a": pairs | dict(batch_size=1), "b": pairs | dict(batch_size=1)}
    one, other = results("runs", 2, cases=cases)
    assert one["a"] == one["b"] == other["a"]
    # Each part of a step of pairs has its own masks, as micro-batches of one rank have.
    alone = gang("runs", 1, cases={"c": cases["a"] | dict(gradient_accumulation_steps=2)})
    expected = alone["ranks"][0]["result"]["c"]
    assert largest(one["a"]["losses"], expected["losses"]) < 1e-5


def test_a_step_is_one_all_reduce(results):
    """Three steps more are three collectives more."""
    for counts in results("counted", 2):
        assert {name: n for name, n in counts.items() if n} == {"all_reduce": 3}


def test_the_first_rank_of_a_node_goes_first(results):
    assert results("in_turn", 2) == [[True, True]] * 2


def test_the_process_group_of_the_user_is_used_and_stays(results):
    assert results("own_group", 2) == [[True, True]] * 2


def test_the_benchmark_of_several_gpus_runs_on_the_cpu(gang):
    answer = gang("bench", 2, parts=["bandwidth", "products", "bf16"])
    assert not any(r["exit"] for r in answer["ranks"]), answer["ranks"][0]["text"]
    rows = [json.loads(x) for x in (answer["scratch"] / "rows.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    found = {row["name"]: row for row in rows}
    assert found["replicated, twice"]["same_bits_on_two_runs"]
    bits = {found[f"sharded, {n} ahead"]["bits"] for n in (0, 1, 2)}
    assert bits == {found["data parallel, 2 ranks"]["bits"]}  # sharding changes no bit
    table = (answer["scratch"] / "table.md").read_text()
    assert len(table.splitlines()) == len(rows) + 2
