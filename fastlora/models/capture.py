"""Named intermediate results of a forward pass: `Taps` captures them and adds tensors to them.

A place is a point in the decoder that has a name:

    embed               the input of the first layer: embedded tokens with NEFTune's noise
    layers.I.in         the input of layer I
    layers.I.attn.out   attention's result after o_proj, before it is added to the layer's input
    layers.I.mlp.out    the MLP's result, before it is added to its input
    layers.I.out        the output of layer I
    norm                the final norm's output, which the head reads

A captured tensor includes what is added at its place. Layers are compiled without these places.
If a tensor is captured or added at attn.out or mlp.out of a layer, this layer runs as another
function, `tapped_layer`, which is another compiled graph. All other places are outside of the
layers' graphs.

`tapped_layer` computes the same bits, with one exception. In 16 bits Inductor does not round values
inside a kernel. A captured tensor is rounded, and may be read by the next kernel. LoRA's products
are never fused, so there nothing changes; with DoRA and with experts the logits differ by one
rounding (torch 2.13, CPU).
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.models.attention import add_residual, attention_block
from fastlora.models.layer import decoder_layer, pieces, recomputed
from fastlora.models.layer_spec import LayerSpec
from fastlora.models.mlp import mlp_output
from fastlora.models.params import LayerAdapter, LayerParams
from fastlora.ops.attention.flash import Spans
from fastlora.ops.dispatch import transforms_active
from fastlora.runtime.layer_fetching import taken

INSIDE = ("attn.out", "mlp.out")  # places inside a layer


def place_names(layers: int) -> list[str]:
    """The names of all places of a model with this many layers, in the order of computation."""
    each = [f"layers.{i}.{x}" for i in range(layers) for x in ("in", *INSIDE, "out")]
    return ["embed", *each, "norm"]


def plus(x: Float[Tensor, "*b d"], added: Float[Tensor, "..."] | None) -> Float[Tensor, "*b d"]:
    """x + added, rounded once to x.dtype; None adds nothing."""
    return x if added is None else (x + added).to(x.dtype)


class Taps:
    """The tensors that one forward pass captures and adds. The decoder fills `captured`."""

    def __init__(
        self, capture: Collection[str] = (), add: Mapping[str, Float[Tensor, "..."]] | None = None
    ) -> None:
        """Nothing is captured yet.

        Args:
            capture: names of places.
            add: name of a place -> a tensor that broadcasts to [b, t, d].
        """
        self.wanted, self.added = capture, add or {}
        self.idle = not self.wanted and not self.added
        self.captured: dict[str, Tensor] = {}

    def at(self, place: str, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """x plus the tensor that is added at this place. The decoder continues with the result,
        which is captured if the caller asked for it."""
        if self.idle:
            return x
        x = plus(x, self.added.get(place))
        if place in self.wanted:
            self.captured[place] = x
        return x

    def layer(self, i: int, rest: tuple, static: tuple) -> tuple[Callable, tuple, tuple]:
        """(function, arguments, static arguments) of layer i, from those of `decoder_layer`."""
        added = {x: v for x in INSIDE if (v := self.added.get(f"layers.{i}.{x}")) is not None}
        captured = tuple(x for x in INSIDE if f"layers.{i}.{x}" in self.wanted)
        if not added and not captured:
            return decoder_layer, rest, static
        return tapped_layer, (*rest, added), (captured, *static)

    def after(self, i: int, result: Any) -> Float[Tensor, "b t d"]:
        """The output of layer i, from the result of the function of `layer`."""
        x, inside = result if isinstance(result, tuple) else (result, {})
        self.captured |= {f"layers.{i}.{place}": y for place, y in inside.items()}
        return self.at(f"layers.{i}.out", x)


def tapped_layer(
    x: Float[Tensor, "b t d"],
    params: LayerParams | Callable[[], LayerParams],
    adapter: LayerAdapter,
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
    mask: Bool[Tensor, "#b 1 t t"] | Spans | None,
    key: Int[Tensor, "..."] | None,
    added: dict[str, Float[Tensor, "..."]],
    captured: tuple[str, ...],
    spec: LayerSpec,
    level: str,
    chunks: int = 1,
) -> tuple[Float[Tensor, "b t d"], dict[str, Float[Tensor, "b t d"]]]:
    """(`layer.decoder_layer`'s result, captured tensors by place), with the same operations.

    The captured tensors are kept at every recompute level, because they are results.

    Args:
        x: the layer's input.
        params: as `decoder_layer`.
        adapter: as `decoder_layer`.
        cos: as `decoder_layer`.
        sin: as `decoder_layer`.
        mask: as `decoder_layer`.
        key: as `decoder_layer`.
        added: place of INSIDE -> the tensor to add there.
        captured: the places of INSIDE to return.
        spec: as `decoder_layer`.
        level: as `decoder_layer`.
        chunks: as `decoder_layer`.
    """

    def attend(x: Tensor) -> Tensor:
        attended = attention_block(x, taken(params), adapter, cos, sin, mask, spec, key)
        return plus(attended, added.get("attn.out"))

    def mlp(x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        h, here = add_residual(x, attended, spec), taken(params)
        if chunks == 1:
            out = mlp_output(h, here, adapter, spec, key)
        else:
            parts = [mlp_output(part, here, adapter, spec, key) for part in pieces(h, chunks)]
            out = torch.cat(parts, 1).view(x.shape)
        out = plus(out, added.get("mlp.out"))
        return add_residual(h, out, spec), out

    def layer(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attended = attend(x)
        return *mlp(x, attended), attended

    fetch = None if isinstance(params, dict) else params
    # The same choice as in `decoder_layer`.
    if level == "none" or not torch.is_grad_enabled() or transforms_active():
        y, mlp_out, attended = layer(x)
    elif level == "mlp":
        attended = recomputed(attend, "selective", x, fetch=fetch)
        y, mlp_out = recomputed(mlp, "full", x, attended, fetch=fetch)
    else:
        y, mlp_out, attended = recomputed(layer, level, x, fetch=fetch)
    results = {"attn.out": attended, "mlp.out": mlp_out}
    return y, {place: results[place] for place in captured}
