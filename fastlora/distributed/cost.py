"""The cost of a step on several ranks: bytes that travel, and seconds that nothing hides.

W            bytes of the layers' weights, in L layers      E   bytes of embedding and head
A            parameters of the adapter                      N   ranks, in groups of S that share a
                                                                base: N = S x R
B            bytes a second of a group, by its slowest link
P            share of the computation that are matrix products

A rank receives in one step with one micro-batch:

    data parallel   2 (N - 1) / N * 4 A                  one sum of float32 gradients
    sharded         ((2 L - 1) / L * W + E) (S - 1) / S  layers forward and backward, of which
                                                         the last one stays; both ends once
    host            ((2 L - 1) / L * W + E) / S          copied from host memory

The transfer of a layer runs beside the computation of the layer before it. Of each transfer, the
seconds that are longer than that are exposed, and so are embedding, head and the sum. Transfers of
layers from host memory and between ranks follow each other as in a pipeline: the slower one counts.
Inside a machine, and from host memory, copy engines bring the parts, which takes nothing from the
computation but 1 to 2 % by memory traffic (h200-x2-peer-copies-* in scripts/bench/results.jsonl),
which is not counted. Between machines NCCL's blocks take multiprocessors from products, which gain
nothing from running beside a gather: both together take the sum of their times
(h200-x2-products-*).

    exposed = (L - 1) (max(0, t_layer - forward / L) + max(0, t_layer - backward / L))
              + t_layer + t_ends + t_sum
    lost    = P times the seconds of NCCL's gathers that run beside layers: all but the first one

A gather fits beside a layer in bf16 from F / B tokens a rank on, where F is the rate of products:
the model cancels out. NF4 needs 0.26 of that. On H100: 3,300 tokens with NVLink, 19,000 with one
400G port a node.

NVLink's rate was measured between two H200s, and the rate from host memory on one; the others are
REACHED of those of data sheets, which is assumed.
"""

from dataclasses import dataclass
from typing import NamedTuple

REACHED = 0.8  # of a data sheet's rate, by a large transfer

# Bytes a second that a rank can receive in a collective over one machine. NVLink: 436 MiB, a layer
# of 8B in bf16, are gathered by two H200s in 1.00 ms, at 229e9 of the data sheet's 450e9; 113 MiB
# at 176e9 and 1,711 MiB at 260e9 (h200-x2-bandwidth-*-2026-11-30).
LINKS = {"nvlink": 229e9, "pcie5": REACHED * 50e9, "pcie4": REACHED * 25e9}

# Bytes a second between machines, of each machine: all its ranks use its ports at once.
NETWORKS = {"8x400g": REACHED * 400e9, "400g": REACHED * 50e9, "100g": REACHED * 12.5e9}

# Bytes a second that large copies from pinned host memory reach, by the link inside a machine.
# NVLink connects GPUs; the host is behind PCIe 5, which gave 58e9 on an H100 (models/levels.py).
HOST_RATES = {"nvlink": 55e9, "pcie5": 55e9, "pcie4": 22e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The machines of a run."""

    devices: int = 1
    """GPUs of each machine."""
    nodes: int = 1
    """Machines."""
    link: str = "nvlink"
    """A key of LINKS."""
    network: str = "8x400g"
    """A key of NETWORKS."""

    @property
    def ranks(self) -> int:
        """GPUs of all machines."""
        return self.devices * self.nodes

    def rate(self, ranks: int) -> float:
        """Bytes a second that a rank receives in a group of so many consecutive ranks."""
        rate = LINKS[self.link]
        return rate if ranks <= self.devices else min(rate, NETWORKS[self.network])


class Bytes(NamedTuple):
    """What a step's costs depend on, in bytes, except `layers`."""

    layers: int
    layer: int  # of the largest layer
    all_layers: int
    ends: int  # embedding and head; a tied matrix counts twice, because it is fetched twice
    adapter: int  # gradients in float32


class Cost(NamedTuple):
    """Of one rank and step."""

    gathered_bytes: int
    """Received from other ranks: weights."""
    copied_bytes: int
    """Copied from host memory: weights."""
    summed_bytes: int
    """Received from other ranks: gradients."""
    exposed_seconds: float
    """By which these transfers make the step longer: exposed and lost."""


def step_cost(
    sizes: Bytes,
    cluster: Cluster,
    shard: int,
    host: bool,
    forward: float,
    backward: float,
    products: float,
) -> Cost:
    """The cost of a step with one micro-batch.

    Args:
        sizes: of model and adapter.
        cluster: the machines.
        shard: ranks that share a base; 1: every rank has all of it.
        host: whether the parts are in host memory.
        forward: seconds of all layers' forward passes.
        backward: seconds of all layers' backward passes.
        products: share of these in which matrix products run.
    """
    n, passes = cluster.ranks, (2 * sizes.layers - 1) / sizes.layers
    others = (shard - 1) / shard
    moved = passes * sizes.all_layers + sizes.ends
    gathered, copied = moved * others, moved / shard if host else 0.0
    summed = 2 * (n - 1) / n * sizes.adapter
    # Seconds for each byte of the base.
    of_gather = others / cluster.rate(shard)
    of_copy = 1 / shard / HOST_RATES[cluster.link] if host else 0.0
    slower = max(of_gather, of_copy)
    layer, layers = sizes.layer * slower, sizes.layers
    waits = max(0.0, layer - forward / layers) + max(0.0, layer - backward / layers)
    waits *= layers - 1  # nothing runs beside the first layer's transfer
    exposed = waits + ((layer + sizes.ends * (of_gather + of_copy)) if slower else 0.0)
    exposed += summed / cluster.rate(n) if n > 1 else 0.0
    if shard > cluster.devices or host:  # by NCCL
        beside = 2 * (layers - 1) * sizes.layer * of_gather - waits
        exposed += products * max(0.0, beside)
    return Cost(round(gathered), round(copied), round(summed), exposed)


def shard_choices(cluster: Cluster) -> list[int]:
    """Numbers of ranks that may share a base: divisors of a machine's GPUs, and whole machines.

    At most 64 ranks, because the model has no term for the latency of larger groups.
    """
    within = [n for n in range(1, cluster.devices + 1) if cluster.devices % n == 0]
    across = [cluster.devices * n for n in range(1, cluster.nodes + 1) if cluster.nodes % n == 0]
    return sorted({*within, *(n for n in across if n <= 64)})
