"""plan() with several ranks, and the tables of the wing's README."""

from functools import partial
from pathlib import Path

import plan_table
import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.checkpoints.reading import check_base, read_base
from fastlora.distributed.cost import Bytes, Cluster, shard_choices, step_cost
from fastlora.distributed.mesh import fewest_ranks
from fastlora.distributed.reading import base_bytes as bytes_in_folder
from fastlora.training.planning.memory import base_bytes, peak_bytes

README = Path(fastlora.__file__).parent / "distributed" / "README.md"
SIZES = Bytes(layers=4, layer=100, all_layers=400, ends=60, adapter=80)


@pytest.fixture(scope="module")
def large():
    return plan_table.model_of("70B", in_4bit=True)


def test_the_readme_has_lines_of_both_tables(large):
    """All lines take 14 seconds of a CPU: python scripts/bench/plan_table.py prints them."""
    text = README.read_text()
    small = plan_table.model_of("8B", in_4bit=False)
    lines = [plan_table.sharded_line(large, "70B", True, n) for n in (2, 64)]
    lines += [plan_table.sharded_line(small, "8B", False, n) for n in (512,)]
    lines += [plan_table.streamed_line(large, "70B", True, "24GB")]
    assert [line for line in lines if line not in text] == []
    assert text.count("does not fit") == 10


def test_bytes_of_a_step_by_hand():
    """4 layers of 100 bytes, of which 7 passes of a layer are received, over 2 of 4 ranks."""
    cluster = Cluster(devices=4, link="pcie5")
    cost = step_cost(SIZES, cluster, 2, False, 1e9, 1e9, products=0.0)
    assert cost.gathered_bytes == (7 * 100 + 60) / 2
    assert cost.summed_bytes == 2 * 3 / 4 * 80 and cost.copied_bytes == 0
    # Compute hides all layers but the first; embedding, head and the sum are in the open.
    rate = 0.8 * 50e9
    assert cost.exposed_seconds == pytest.approx(((100 + 60) / 2 + 120) / rate)
    # Copy engines take nothing from products; NCCL's do, between machines: six of them.
    assert step_cost(SIZES, cluster, 2, False, 1e9, 1e9, products=0.75) == cost
    apart = Cluster(devices=1, nodes=4, link="pcie5", network="400g")
    ideal, losing = (step_cost(SIZES, apart, 2, False, 1e9, 1e9, products=p) for p in (0, 0.75))
    assert ideal == cost  # the network is as fast as this link
    assert losing.exposed_seconds - cost.exposed_seconds == pytest.approx(0.75 * 300 / rate)
    # Without any compute all bytes are in the open, and nothing is lost.
    for machines in (cluster, apart):
        bare = step_cost(SIZES, machines, 2, False, 0.0, 0.0, products=0.75)
        assert bare.exposed_seconds == pytest.approx((bare.gathered_bytes + 120) / rate)


def test_a_base_in_host_memory_is_copied_and_then_gathered():
    """Copies from host memory take nothing from products."""
    alone = step_cost(SIZES, Cluster(link="pcie4"), 1, True, 1e9, 1e9, products=0.75)
    assert (alone.gathered_bytes, alone.copied_bytes, alone.summed_bytes) == (0, 760, 0)
    assert alone.exposed_seconds == pytest.approx(160 / 22e9)
    both = step_cost(SIZES, Cluster(devices=2), 2, True, 1e9, 1e9, products=0.75)
    assert (both.gathered_bytes, both.copied_bytes) == (380, 380)


def test_groups_of_ranks():
    assert shard_choices(Cluster(devices=8)) == [1, 2, 4, 8]
    assert shard_choices(Cluster(devices=8, nodes=16)) == [1, 2, 4, 8, 16, 32, 64]
    assert shard_choices(Cluster(devices=3, nodes=2)) == [1, 3, 6]


def test_auto_takes_the_fewest_ranks_that_hold_the_base(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [fewest_ranks(n, 100) for n in (60, 61, 240, 10_000)] == [1, 2, 4, 8]


@pytest.mark.parametrize("kind", ["dense", "nf4 nested", "int8"])
def test_bytes_of_a_base_are_known_before_it_is_read(kind, dense_folder, quantised_folder):
    """Tables and scales in float32 are left out: beside a layer of this size they are large."""
    folder = (dense_folder if kind == "dense" else partial(quantised_folder, kind))(
        dtype=torch.bfloat16
    )
    _, base = read_base(folder)
    held = sum(x.nbytes for x in tree_leaves(base) if x.dtype != torch.float32)
    assert bytes_in_folder(check_base(folder)) == pytest.approx(held, rel=0.02)


def test_memory_of_a_rank(large):
    """The parts of the base, two layers in a backward pass, the head during the loss."""
    size = base_bytes(large)
    whole, half = (peak_bytes(large, "full", 1, 64, shard=n) for n in (1, 2))
    host = peak_bytes(large, "full", 1, 64, host=True)
    assert whole - half == pytest.approx((size.layers + size.ends) / 2 - 2 * size.layer, rel=0.05)
    assert whole - host == pytest.approx(size.layers + size.ends - size.head - size.layer, rel=0.05)


def test_a_model_that_fits_is_replicated_and_a_large_one_is_sharded(large):
    small = plan_table.model_of("8B", in_4bit=True)
    machines = dict(devices=8, nodes=2, card="H100")
    assert fastlora.plan(small, 4, 2048, "80GB", **machines).chosen.shard == 1
    chosen = fastlora.plan(large, 4, 2048, "24GB", **machines).chosen
    assert chosen.shard >= 4 and chosen.shard * chosen.replicate == 16
    assert chosen.step_seconds > chosen.exposed_seconds > 0 and 0.8 < chosen.efficiency < 1
    unknown = fastlora.plan(large, 1, 2048, "24GB", devices=8).chosen
    assert unknown.efficiency is None and unknown.gathered_bytes > 0


def test_one_card_is_planned_as_before(large):
    chosen = fastlora.plan(large, 1, 2048, "80GB", card="H100").chosen
    assert (chosen.shard, chosen.replicate, chosen.exposed_seconds) == (1, 1, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(devices=0), "devices=0"),
        (dict(nodes=0), "nodes=0"),
        (dict(link="string"), "link='string'"),
        (dict(network="wifi"), "network='wifi'"),
        (dict(shard=3, devices=8), "shard=3"),
        (dict(shard="node"), "shard='node'"),
    ],
)
def test_bad_arguments_are_refused_by_name(large, given, message):
    with pytest.raises(ValueError, match=message):
        fastlora.plan(large, 1, 64, "80GB", **given)
