"""run_layer: a layer whose tensors may be on the device only while it runs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.models.init_offset import cast_offset
from fastlora.ops.dispatch import transforms_active
from fastlora.runtime.host_offload import Copies, HostStash
from fastlora.runtime.layer_fetching import LayerPass


def run_layer(
    fetched: LayerPass | None,
    i: int,
    rest: tuple,
    how: tuple[Callable[..., Any], tuple, bool],
    x: Float[Tensor, "b t d"],
    stash: HostStash | None,
    copies: Copies,
) -> Any:
    """The result of layer i's function. Autograd keeps none of the tensors that were fetched.

    Args:
        fetched: the pass, with layer i on the device; None: all layers stay on the device.
        i: the layer's number.
        rest: the layer's other tensors, its params first.
        how: (a function of rest, static, compile and x; static; compile). The last two of `static`
            are the recompute level and a number of chunks.
        x: the layer's input.
        stash: where activations wait for the backward pass; None: on the device.
        copies: of the adapter's matrices.
    """
    run, static, compile = how
    if fetched is None or not torch.is_grad_enabled() or transforms_active():
        layer = partial(run, rest, static, compile)
        return layer(x) if stash is None else stash.run(layer, x, rest, copies)
    *_, level, _ = static
    if not compile and level != "none":
        # An eager checkpoint keeps what its function refers to, so it gets a function for params.
        rest = (lambda: cast_offset(fetched.params_again(i), x.dtype), *rest[1:])
    weights = fetched.refetched(i)
    layer = partial(run, rest, static, compile)
    if stash is not None:
        return stash.run(layer, x, rest, copies, weights)
    with weights.hooks():
        return layer(x)
