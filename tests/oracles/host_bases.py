"""A model whose base is moved to host memory after loading, to compare with the model itself.

`load(shard="host")` never has the whole base on the device.
"""

from dataclasses import replace
from typing import Any

from fastlora.distributed.host_shards import HostCopies
from fastlora.distributed.sharded_base import Shards, shard_layers, shard_matrix
from fastlora.model import Model
from fastlora.models.names import EDGE_WEIGHTS


def in_host_memory(model: Model) -> Model:
    """The model with all of its base but the last norm in host memory. It itself is unchanged."""
    base: Any = model.base
    shards, layers = Shards(HostCopies(base["norm"].device)), base["layers"]
    edges = {k: shard_matrix(shards, k, base[k]) for k in EDGE_WEIGHTS if k in base}
    sharded = shard_layers(shards, len(layers), lambda i: layers[i])
    return replace(model, base={**base, "layers": sharded, **edges})
