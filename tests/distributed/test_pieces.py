"""Which rank runs which rows, and what a launcher's variables mean."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from fastlora import functional as FL
from fastlora.data.batches import batches, count_trained_tokens
from fastlora.data.examples import make_example
from fastlora.distributed.agreement import shared_gpus
from fastlora.distributed.dealing import deal, load_of, split_for
from fastlora.distributed.launch import Launch, launched, own_device
from fastlora.distributed.rounds import agree_on_round
from fastlora.training.dealt_batches import Dealer
from oracles.trees import token_ids

LENGTHS = [3, 60, 5, 9, 31, 12, 7, 2, 44, 6, 8]
EXAMPLES = [make_example([*range(1, n + 1)], [True] * n) for n in LENGTHS]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("steps", [1, 3])
def test_pieces_of_all_ranks_are_the_step(ranks, steps):
    split = split_for(0, ranks, rows=6, batch_size=2, micro_batches=steps)
    pieces = split.pieces(10, 10 + 6 * steps - 1)  # the last micro-batch lacks one
    rows = [i for p in pieces for i in range(p.begin, p.end)]
    assert rows == list(range(10, 10 + 6 * steps - 1))
    assert all(0 < p.end - p.begin <= 2 for p in pieces)
    assert all(p.begin == 10 + 6 * p.micro_batch + p.row for p in pieces)
    assert [p.number for p in pieces] == list(range(len(pieces)))
    # Pieces become smaller for more ranks, until each rank has one.
    largest = max(p.end - p.begin for p in pieces)
    assert largest == min(2, -(-6 // -(-ranks // steps)))


def test_equal_pieces_are_dealt_in_turn_and_unequal_ones_to_the_least_loaded():
    assert deal([100.0, 105.0, 102.0, 99.0, 100.0], 2) == [0, 1, 0, 1, 0]
    loads = [9.0, 1.0, 8.0, 1.0, 1.0, 7.0, 2.0, 1.0]
    ranks = deal(loads, 3)
    totals = [sum(x for x, r in zip(loads, ranks, strict=True) if r == k) for k in range(3)]
    assert max(totals) == 10.0 and sum(totals) == sum(loads)
    assert load_of(2, 2**15) == 2 * load_of(2, 2**15 // 2) * 2 / 1.5


def dealers(ranks: int, masked: bool = False, lockstep: bool = False) -> list[Dealer]:
    return [
        Dealer(split_for(r, ranks, 4, 2, 2), batches, masked=masked, lockstep=lockstep)
        for r in range(ranks)
    ]


@pytest.mark.parametrize("masked", [False, True])
def test_the_batches_of_all_ranks_hold_each_example_once(masked):
    steps = [
        [*zip(range(4), d.epochs(EXAMPLES, 2, 0, 0), strict=False)] for d in dealers(3, masked)
    ]
    for epoch in (0, 2):  # two steps each, of 8 and 3 examples
        found = [b for rank in steps for _, step in rank[epoch : epoch + 2] for b in step]
        tokens = [int(m.sum()) for b in found for m in b["attention_mask"]]
        assert sorted(tokens) == sorted(LENGTHS)
    widths = {}
    for rank in steps:
        for batch, piece in zip(rank[0][1], rank[0][1].pieces, strict=True):
            widths.setdefault(piece.micro_batch, set()).add(batch["input_ids"].shape[1])
    assert (max(map(len, widths.values())) == 1) == masked


def test_ranks_in_lockstep_run_the_same_number_of_passes():
    steps = [next(iter(d.epochs(EXAMPLES, 2, 0, 1))) for d in dealers(3, lockstep=True)]
    assert {len(step) for step in steps} == {1}
    assert sum(len(step.pieces) for step in steps) == 2
    extra = next(step for step in steps if not step.pieces)
    assert count_trained_tokens(extra[0]) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_parts_of_a_batch_add_up_to_it_under_dropout_and_noise(tiny, packed):
    ids = token_ids(3, 8)
    batch = {"input_ids": ids, "labels": ids}
    if packed:
        batch["segment_ids"] = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3]] * 3)
    spec = torch.utils._pytree.tree_map(lambda x: x, tiny.spec)
    seed = torch.tensor(11)
    whole, _ = FL.loss_sum(tiny.adapter, tiny.base, spec, batch, seed=seed)
    parts = [
        FL.loss_sum(
            tiny.adapter, tiny.base, spec, {n: x[a:b] for n, x in batch.items()},
            seed=seed, first_row=torch.tensor(8 * a),
        )[0]
        for a, b in ((0, 1), (1, 3))
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)
    wrong, _ = FL.loss_sum(tiny.adapter, tiny.base, spec, batch, seed=seed + 1)
    assert not torch.allclose(wrong, whole)


def test_a_process_is_alone_unless_a_launcher_says_otherwise(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launched() is None
    for name, value in dict(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4).items():
        monkeypatch.setenv(name, str(value))
    assert launched() == Launch(5, 8, 1, 4, 0)
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(ValueError, match="LOCAL_RANK='x'"):
        launched()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="RANK=8 is not below WORLD_SIZE=8"):
        launched()


def test_each_rank_gets_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1).items():
        monkeypatch.setenv(name, str(value))
    assert own_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert own_device(torch.device("cuda:0")) == torch.device("cuda", 0)
    assert [d.index for d in chosen] == [1, 0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="torch finds 1 CUDA devices"):
        own_device(torch.device("cuda"))


def test_ranks_that_share_a_gpu_are_named():
    names = [dict(host="a", gpu="x"), dict(host="b", gpu="x"), dict(host="a", gpu="x")]
    assert shared_gpus(names) == ["ranks 0, 2 use one GPU (x of a)"]
    assert not shared_gpus([dict(host="a", gpu="")] * 2)


def rounds(store: dist.HashStore, ranks: range) -> list[str]:
    """The names that ranks agree on, each in a thread."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        started = [pool.submit(agree_on_round, store, r, len(ranks), 20.0) for r in ranks]
        return [x.result() for x in started]


def test_each_start_has_one_name_that_no_other_start_has():
    store, names = dist.HashStore(), []
    for count in (3, 3, 2, 4):  # the words of earlier starts stay in the store
        found = rounds(store, range(count))
        assert len({*found}) == 1
        names.append(found[0])
    assert len({*names}) == 4


def test_a_rank_that_does_not_start_is_named():
    with pytest.raises(TimeoutError, match="ranks 1, 2 did not start"):
        agree_on_round(dist.HashStore(), 0, 3, 0.05)
