"""One decoder layer to run alone, and the graphs that torch.compile makes of it."""

from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves

from fastlora.model import Model
from fastlora.models.decoder import position_tables
from fastlora.models.layer import decoder_layer
from fastlora.models.layer_spec import layer_spec
from oracles.trees import token_ids


class Layer:
    """One decoder layer of a model, to run and differentiate at any level."""

    def __init__(self, model: Model, t: int = 10, masked: bool = False, drop: bool = True) -> None:
        config, dtype = model.spec.config, model.base["norm"].dtype
        ids = token_ids(2, t, vocab_size=config.vocab_size)
        segments = (torch.arange(t) > 5).long().expand(2, t) if masked else None
        at = position_tables(config, ids, dtype, None, None, segments)
        self.x = torch.nn.functional.embedding(ids, model.base["embed_tokens"])
        self.adapter = {
            name: type(lora)(*(m.detach().requires_grad_() for m in lora))
            for name, lora in model.adapter["layers"][0].items()
        }
        key = torch.tensor(3) if drop else None
        kind = config.layer_types[0]
        self.args = (*at.tables[kind], at.masks[kind], key)
        self.params, self.spec = model.base["layers"][0], layer_spec(model.spec, 0)

    def run(self, level: str, layer: Any = decoder_layer, chunks: int = 1) -> Tensor:
        x = self.x.detach().requires_grad_()
        y = layer(x, self.params, self.adapter, *self.args, self.spec, level, chunks)
        return y.square().sum()

    def backward(self, value: Tensor) -> None:
        torch.autograd.grad(value, tree_leaves(self.adapter))


def graphs(layer: Layer, level: str, chunks: int = 1) -> tuple[fx.Graph, fx.Graph]:
    """What AOT autograd compiles for the forward and the backward pass, cut as Inductor cuts."""
    kept = []

    def keep(module: fx.GraphModule, _: Any) -> Any:
        kept.append(module.graph)
        return make_boxed_func(module.forward)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    compiled = torch.compile(decoder_layer, fullgraph=True, backend=backend)
    layer.backward(layer.run(level, compiled, chunks))
    forward, backward = kept
    return forward, backward


def saved_elements(graph: fx.Graph) -> int:
    """Floating-point elements that a forward graph saves for the backward one, except arguments."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    values = [n.meta["val"] for n in output.args[0][1:] if n.op != "placeholder"]
    return sum(v.numel() for v in values if isinstance(v, Tensor) and v.is_floating_point())
