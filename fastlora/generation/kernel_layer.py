"""One decoder layer of generation through the operations of ops/decode.

A dense layer has four launches around attention: RMSNorm and q, k, v; o and the residual; RMSNorm,
gate, up and SwiGLU; down and the residual. `kernel_layer` prepares the tensors once. The tokens of
prompts, and a step without Triton, go through torch's matrix products of the same tensors. For
layers that the kernels do not support `kernel_layer` returns None, and forward.py runs them as
training does.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.generation.layer_parts import halves_of, parts_of
from fastlora.generation.prepare import PreparedLayer, PreparedModel
from fastlora.models.attention import Heads, layer_norm, normed_queries_keys, split_qkv
from fastlora.models.capture import INSIDE
from fastlora.models.fused_qkv import QKV
from fastlora.models.layer_spec import LayerSpec
from fastlora.models.mlp import down_name, gate_up_names, mlp_block
from fastlora.models.norms import LayerNorms
from fastlora.models.params import (
    LINEARS,
    LayerParams,
)
from fastlora.ops.attention.rope import apply_rope, in_halves
from fastlora.ops.decode.attention import decode_attention, decode_kernel_serves
from fastlora.ops.decode.linear import decode_product, prompt_product
from fastlora.ops.decode.norm import norm_rows
from fastlora.ops.decode.product import MAX_BATCH, Part, Product, prepare_product
from fastlora.ops.dispatch import Kernels
from fastlora.ops.rms_norm import norm_factor
from fastlora.ops.swiglu.swiglu import gate_product
from fastlora.runtime.layer_fetching import is_sharded


class KernelLayer(NamedTuple):
    """A decoder layer as the kernels read it, for one step at a time of up to b rows.

    `product_heads` and `rest_by_products` take any number of rows.
    """

    source: PreparedLayer
    window: int | None
    qkv: Product
    o: Product
    gate_up: Product | None  # None: the MLP runs in plain torch
    down: Product | None
    # The layer's norms that are not part of a product: those behind one, and those before one whose
    # kernel does not compute them.
    norms: LayerNorms


class StepKernels(NamedTuple):
    """The prepared parts of a decode step. None: not supported."""

    layers: tuple[KernelLayer | None, ...]
    head: Product | None  # the final norm and the logits
    # Whether Triton runs the layers, the head and the step's ends (ops/decode/next_token.py). If it
    # does not, torch runs the layers' products.
    triton: bool = False


def step_kernels(model: PreparedModel, b: int) -> StepKernels:
    """All layers and the head of a model, prepared for steps of up to `b` rows.

    On the CPU, for more than 64 rows and with kernels="torch" in the model's spec, torch runs the
    products and no Triton kernel does (kernels="triton" runs them on the CPU, too).
    """
    layers, base, config = model.layers, model.base, model.spec.config
    triton = layers[0].spec.fused and b <= MAX_BATCH
    # torch's products take any number of rows. A layer for which the adapters of a stack have
    # tensors of any kind differs from row to row.
    rows = b if triton else 1
    own = [model.stack_size is not None and bool(x.adapter) for x in layers]
    if is_sharded(base):  # the kernels keep their weights' addresses
        return StepKernels((None,) * len(layers), None)
    # Nothing can be added inside a kernel layer.
    steered = [any(f"layers.{i}.{x}" in model.added for x in INSIDE) for i in range(len(layers))]
    other = [any(x) for x in zip(own, model.layer_copies, steered, strict=True)]
    made = tuple(
        None if plain else kernel_layer(layer, rows, config.sliding_window)
        for layer, plain in zip(layers, other, strict=True)
    )
    if not triton:
        return StepKernels(made, None)
    logits = None
    # A head with LoRA, trained rows or fake quantisation runs in plain torch, and so does the final
    # norm with a vector added to it.
    plain = model.head is None or model.head.keys() != {"weight"} or "norm" in model.added
    if model.head is not None and not plain and not model.spec.qat_scheme:
        norm = norm_factor(base["norm"], config.norm_kind)
        logits = kernel_head(model.head["weight"], norm, config.rms_norm_eps, b)
    return StepKernels(made, logits, triton=True)


def reads_own_tokens(kernels: StepKernels, dtype: torch.dtype) -> bool:
    """Whether attention in a step reads the indices of a row's own tokens only, as its kernel does.

    `dtype` is the cache's.
    """
    if not kernels.triton or None in kernels.layers:
        return False
    sizes = {layer.source.spec.head_dim for layer in kernels.layers if layer is not None}
    return all(decode_kernel_serves(dtype, head_dim) for head_dim in sizes)


def kernel_layer(layer: PreparedLayer, b: int, window: int | None = None) -> KernelLayer | None:
    """The layer prepared for steps of up to `b` rows, or None if the kernels do not support it.

    Not supported: fake quantisation, weights in 8 bits, stacks of adapters, more than 64 rows,
    several rows in float16, and layers with a sliding window if `window` is None. An MLP that is
    not supported, such as a mixture of experts, runs in plain torch between the kernels. Adapters
    are copied, weights are not. The caller decides whether kernels should run at all
    (`layer.spec.fused`).

    Args:
        layer: of `prepare`.
        b: the largest number of rows.
        window: how many tokens a token sees in a layer of type "sliding_attention".
    """
    params, spec = layer.params, layer.spec
    if layer.attention_type != "sliding_attention":
        window = None
    elif window is None:
        return None
    if not _supported(layer, b):
        return None
    # Kernels of 4-bit weights read a norm in the dtype of x, which 1 + weight is not.
    quantised = any(not isinstance(params[n]["weight"], Tensor) for n in LINEARS if n in params)
    apart = quantised and spec.norm_kind == "one_plus"
    within = LayerNorms(None, None, None, None) if apart else spec.norms
    own = ("qkv_proj",) if "qkv_proj" in params else QKV
    qkv = _product(layer, parts_of(layer, *own), b, norm=within.attention_in)
    o = _product(layer, parts_of(layer, "o_proj"), b)
    if qkv is None or o is None:
        return None
    gate_up = down = None
    if "experts" not in params:
        names = gate_up_names(params)
        parts = halves_of(layer, *names) if len(names) == 1 else parts_of(layer, *names)
        gate_up = _product(layer, parts, b, norm=within.mlp_in, gated=len(parts) == 2)
        down = _product(layer, parts_of(layer, down_name(params)), b)
    if gate_up is None or down is None:
        gate_up = down = None
    norms = spec.norms if apart else spec.norms._replace(attention_in=None, mlp_in=None)
    return KernelLayer(layer, window, qkv, o, gate_up, down, norms)


def _supported(layer: PreparedLayer, b: int) -> bool:
    """Whether nothing but the matrices' kinds may exclude a layer."""
    params, spec = layer.params, layer.spec
    names = [name for name in LINEARS if name in layer.adapter]
    if spec.qat_scheme is not None or any(layer.adapter[name].a.ndim != 2 for name in names):
        return False
    # The scale is part of the product, and so before a norm behind it.
    if spec.residual_scale != 1.0 and (spec.norms.attention_out or spec.norms.mlp_out):
        return False
    # The kernels for several rows round x * norm before they divide by the root mean square, which
    # float16 may not hold.
    return b == 1 or params[spec.norms.names()[0]].dtype != torch.float16


def run_kernel_layer(
    x: Float[Tensor, "b d"],
    layer: KernelLayer,
    cos: Float[Tensor, "b hd"],
    sin: Float[Tensor, "b hd"],
    k_cache: Float[Tensor, "b kv S hd"],
    v_cache: Float[Tensor, "b kv S hd"],
    lengths: Int[Tensor, "b"],
    kernels: Kernels = "triton",
) -> Float[Tensor, "b d"]:
    """The layer's output for one new token of each row, in x.dtype.

    Writes the token's key and value at index lengths[i] of each row's cache.

    Args:
        x: the layer's input, of at most as many rows as the layer was prepared for.
        layer: of `kernel_layer`.
        cos: cosines of each row's position.
        sin: sines of each row's position.
        k_cache: rotated keys; changed in place.
        v_cache: values; changed in place.
        lengths: how many tokens each row's cache holds.
        kernels: "triton", or "torch" for the references of both operations.
    """
    params, spec, norms = layer.source.params, layer.source.spec, layer.norms
    x = x.contiguous()

    def normed(y: Tensor, name: str | None, residual: Tensor | None = None) -> Tensor:
        if name is None:
            return y
        how = spec.rms_norm_eps, spec.norm_kind
        return norm_rows(y, params[name], *how, residual, kernels=kernels)

    # A product adds the residual itself, unless a norm comes between them.
    beside = lambda name: x if name is None else None
    # Each launch clears the `low` of the launch before it; the first one that of the layer's last.
    last = layer.o if layer.down is None else layer.down
    inputs = normed(x, norms.attention_in)
    qkv = decode_product(inputs, layer.qkv, clear=last.low, kernels=kernels)
    q, k, v = _three(qkv, spec)
    if "q_norm" in params:
        width = params["q_norm"].shape[0], params["k_norm"].shape[0]
        q = normed(q.reshape(-1, width[0]), "q_norm").view(q.shape)
        k = normed(k.reshape(-1, width[1]), "k_norm").view(k.shape)
    q, k, v = (y.unflatten(1, (-1, spec.head_dim)) for y in (q, k, v))
    q, k = (in_halves(y, spec.rope_dim, spec.rope_of_neighbours) for y in (q, k))
    angles = (cos, sin) if spec.rope else (None, None)
    how = layer.window, spec.attention_scale, spec.attention_cap
    heads = decode_attention(q, k, v, *angles, k_cache, v_cache, lengths, *how, kernels=kernels)
    name = norms.attention_out
    (y,) = decode_product(
        heads.flatten(1), layer.o, beside(name), clear=layer.qkv.low, kernels=kernels
    )
    x = normed(y, name, x)
    if layer.gate_up is None or layer.down is None:
        # Experts: the form without a synchronisation, which a CUDA graph can record.
        wait = not x.is_cuda
        return mlp_block(x[:, None], params, layer.source.adapter, spec, None, wait=wait)[:, 0]
    inputs, name = normed(x, norms.mlp_in), norms.mlp_out
    (hidden,) = decode_product(inputs, layer.gate_up, clear=layer.o.low, kernels=kernels)
    (y,) = decode_product(
        _gated(hidden, layer.gate_up, spec),
        layer.down,
        beside(name),
        clear=layer.gate_up.low,
        kernels=kernels,
    )
    return normed(y, name, x)


def product_heads(
    x: Float[Tensor, "b t d"],
    layer: KernelLayer,
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
) -> Heads:
    """Rotated q, k and v of any tokens, as `queries_keys_values` returns them."""
    (b, t, _), params, spec = x.shape, layer.source.params, layer.source.spec
    inputs = layer_norm(x.flatten(0, 1), params, layer.norms.attention_in, spec)
    q, k, v = _three(prompt_product(inputs, layer.qkv), spec)
    if "q_norm" in params:
        q, k = normed_queries_keys(q, k, params, spec)
    q, k, v = (y.view(b, t, -1, spec.head_dim) for y in (q, k, v))
    q, k = (in_halves(y, spec.rope_dim, spec.rope_of_neighbours) for y in (q, k))
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v) if spec.rope else (q, k, v)


def rest_by_products(
    x: Float[Tensor, "b t d"], heads: Float[Tensor, "b h t hd"], layer: KernelLayer
) -> Float[Tensor, "b t d"]:
    """The layer's output for any tokens, from its input and attention's result."""
    shape, params, spec = x.shape, layer.source.params, layer.source.spec
    merged = heads.transpose(1, 2).reshape(-1, spec.num_attention_heads * spec.head_dim)
    norms, flat = layer.norms, x.flatten(0, 1)
    flat = _added(merged, layer.o, flat, params, norms.attention_out, spec)
    if layer.gate_up is None or layer.down is None:
        # Experts: of a step without a synchronisation, which a CUDA graph can record.
        wait = shape[1] > 1 or not x.is_cuda
        return mlp_block(flat.view(shape), params, layer.source.adapter, spec, None, wait=wait)
    (hidden,) = prompt_product(layer_norm(flat, params, norms.mlp_in, spec), layer.gate_up)
    hidden = _gated(hidden, layer.gate_up, spec)
    return _added(hidden, layer.down, flat, params, norms.mlp_out, spec).view(shape)


def _added(
    x: Float[Tensor, "n _"],
    product: Product,
    residual: Float[Tensor, "n d"],
    params: LayerParams,
    norm: str | None,
    spec: LayerSpec,
) -> Float[Tensor, "n d"]:
    """residual + the product of x, which goes through a norm first if `norm` names one."""
    if norm is None:
        return prompt_product(x, product, residual)[0]
    return residual + layer_norm(prompt_product(x, product)[0], params, norm, spec)


def kernel_head(
    weight: Float[Tensor, "v d"], norm: Float[Tensor, "d"], eps: float, b: int
) -> Product | None:
    """The final norm and a head without adapter, for up to `b` rows; None if not supported.

    `decode_product(x, head)[0]` returns the logits.
    """
    return prepare_product([Part(weight)], b, norm=norm, eps=eps)


def _product(
    layer: PreparedLayer,
    parts: Sequence[Part],
    b: int,
    *,
    norm: str | None = None,
    gated: bool = False,
) -> Product | None:
    """Matrices of a layer as one product, behind the norm of that name."""
    spec = layer.spec
    factor = None if norm is None else norm_factor(layer.params[norm], spec.norm_kind)
    gelu = spec.activation == "gelu_tanh"
    return prepare_product(parts, b, norm=factor, eps=spec.rms_norm_eps, gated=gated, gelu=gelu)


def _three(ys: Sequence[Float[Tensor, "n _"]], spec: LayerSpec) -> Sequence[Float[Tensor, "n _"]]:
    """q, k and v of a product of three matrices, or of one."""
    return ys if len(ys) == 3 else split_qkv(ys[0], spec)


def _gated(y: Float[Tensor, "n _"], product: Product, spec: LayerSpec) -> Float[Tensor, "n f"]:
    """The input of down_proj: y, or the product of its halves if the kernels did not gate it."""
    if product.gated:
        return y
    return gate_product(*y.chunk(2, -1), gelu=spec.activation == "gelu_tanh")
