"""The kernels that Inductor writes for a decoder layer on an H100, without one.

    python scripts/layer_kernels.py --shape 1b --recompute none
    python scripts/layer_kernels.py --shape 8b --recompute selective --code kernels.py

For thinking before measuring: which passes over memory a change to the model adds or takes away. A
layer's forward and backward graphs are traced on the CPU with tensors that hold nothing, sent to a
GPU that is described but not there, and given to Inductor up to its source text. Printed are the
kernels in the order they run, with the bytes of their inputs and outputs and what these take at
3.35 TB/s; products and our own ops without a time. Reading twice inside one kernel, a reduction
over a row that does not fit into registers, is not counted: look at the source.

Attention stands for whichever kernel SDPA would choose: q's layout in, q's layout out, keys and
values expanded to the heads of the queries, which cuDNN does inside. "full" is not offered: there
the graph saves and restores the generator's state around SDPA, which asks a real GPU.
"""

import argparse
import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from bench import add_layer_arguments
from random_checkpoint import SHAPES
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import fastlora
from fastlora.llama.config import LlamaConfig
from fastlora.llama.layer import LayerSpec, layer_spec
from fastlora.llama.params import (
    EXPERTS,
    PROJECTIONS,
    ExpertLoRA,
    LayerParams,
    LoRA,
    layer_targets,
    layer_tensors,
    projection_shape,
)
from fastlora.llama.recompute import LEVELS, decoder_layer
from fastlora.llama.stacked import QKV

BANDWIDTH = 3.35e12  # bytes a second of an H100's HBM3
H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


class Kernel(NamedTuple):
    """One kernel; bytes of its inputs and outputs, each counted once."""

    name: str
    ours: bool  # written by Inductor
    bytes: int


@contextmanager
def an_h100() -> Iterator[None]:
    """Torch's questions about the GPU are answered as an H100 would."""
    properties = lambda *args, **kwargs: H100
    answers = {
        "torch._subclasses.fake_tensor.init_gpu_context": lambda *args: None,
        "torch.cuda.get_device_properties": properties,
        "torch.cuda.get_device_capability": lambda *args: (9, 0),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda._lazy_init": lambda: None,
        "torch.utils._triton.triton_hash_with_backend": lambda *args: "",
        "torch._inductor.scheduler.has_triton": lambda *args: True,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        for place in (CudaInterface, CudaInterface.Worker):
            stack.enter_context(
                mock.patch.object(place, "get_device_properties", staticmethod(properties))
            )
        capability = staticmethod(lambda *args, **kwargs: 90)
        stack.enter_context(mock.patch.object(CudaInterface, "get_compute_capability", capability))
        yield


# ── tracing a layer ───────────────────────────────────────────────────────────────────────


def attention_ops() -> torch.library.Library:
    """Ops that stand for SDPA in both directions; kept by the caller for as long as they serve."""
    library = torch.library.Library("layer_kernels", "DEF")
    library.define("attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
    library.define(
        "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse)"
        " -> (Tensor, Tensor, Tensor)"
    )
    like = torch.empty_like
    torch.library.register_fake(
        "layer_kernels::attention",
        lambda q, k, v: (like(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
        lib=library,
    )
    torch.library.register_fake(
        "layer_kernels::attention_backward",
        lambda dy, q, k, v, y, lse: (like(q), like(k), like(v)),
        lib=library,
    )
    return library


def traced(args: argparse.Namespace) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The layer's graphs, forward and backward, as they come from the partitioner, on the CPU."""
    found: list[fx.GraphModule] = []

    def partition(joint: fx.GraphModule, inputs: Any, **how: Any) -> Any:
        compile_fx._recursive_joint_graph_passes(joint)
        how["compiler"] = "inductor"
        both = min_cut_rematerialization_partition(joint, inputs, **how)
        found.extend(copy.deepcopy(graph) for graph in both)
        return both

    run: Callable[..., Any] = lambda graph, inputs: make_boxed_func(graph.forward)
    backend = aot_autograd(
        fw_compiler=run,
        bw_compiler=run,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    config = LlamaConfig.from_hf(SHAPES[args.shape])
    spec = spec_of(args, config)
    with FakeTensorMode():
        arguments: tuple[Any, ...] = (*layer_arguments(args, config), spec, args.recompute)
        layer: Callable[..., Any] = torch.compile(decoder_layer, fullgraph=True, backend=backend)
        layer(*arguments)
    return found[0], found[1]


def layer_arguments(args: argparse.Namespace, config: LlamaConfig) -> tuple[Any, ...]:
    """The tensors that decoder_layer takes, without values; call it under a FakeTensorMode."""

    def new(*shape: int, grad: bool = False) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, requires_grad=grad)

    params: LayerParams = {}
    for path, (_, shape) in layer_tensors(config, 0).items():
        if len(path) == 1:
            params[path[0]] = new(*shape)
        else:
            params.setdefault(path[0], {})[path[1]] = new(*shape)
    adapter = {name: lora_of(config, name, args.rank, new) for name in targets_of(args, config)}
    x = new(args.batch, args.seq, config.hidden_size, grad=True)
    params["qkv"] = new(sum(params[name]["weight"].shape[0] for name in QKV), config.hidden_size)
    cos, sin = (new(1, args.seq, config.head_dim) for _ in range(2))
    key = torch.empty((), dtype=torch.int64) if args.dropout else None
    return x, params, adapter, cos, sin, None, key


def lora_of(config: LlamaConfig, name: str, r: int, new: Callable[..., Tensor]) -> Any:
    """The trained matrices of one projection, or of an experts' tensor."""
    rows, columns = projection_shape(config, name)
    if name not in EXPERTS:
        return LoRA(new(r, columns, grad=True), new(rows, r, grad=True))
    e = config.num_local_experts
    return ExpertLoRA(new(e, r, columns, grad=True), new(e, rows, r, grad=True))


def targets_of(args: argparse.Namespace, config: LlamaConfig) -> list[str]:
    """The layer's own among --targets; a sparse layer's router and experts always."""
    own = layer_targets(config, 0)
    return [name for name in own if name in args.targets or name not in PROJECTIONS]


def spec_of(args: argparse.Namespace, config: LlamaConfig) -> LayerSpec:
    """Of a layer as `fastlora.lora` would have it; the demo lends the rest of a spec."""
    demo, _ = fastlora.load("demo", device="cpu")
    how: dict[str, Any] = dict(r=args.rank, lora_alpha=args.rank, lora_dropout=args.dropout)
    model = fastlora.lora(demo, **how)
    spec = layer_spec(replace(model.spec, config=config), 0, fused=args.kernels == "auto")
    return replace(spec, scalings=tuple((name, 1.0) for name in targets_of(args, config)))


# ── as Inductor would have it ─────────────────────────────────────────────────────────────


def on_gpu(graph: fx.GraphModule) -> tuple[FakeTensorMode, list[Any]]:
    """Rewrite a graph for the GPU; its fake mode, and its inputs there."""
    aten, ours = torch.ops.aten, torch.ops.layer_kernels
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu.default: (ours.attention.default, 3),
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (
            ours.attention_backward.default,
            6,
        ),
    }
    inputs = []
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    mode = next(n.meta["val"].fake_mode for n in places if isinstance(n.meta["val"], Tensor))
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in attention:
            node.target, arguments = attention[node.target]
            node.args, node.kwargs = node.args[:arguments], {}
        elif "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    with mode:
        for node in places:
            x = node.meta["val"]
            if isinstance(x, Tensor):
                x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            inputs.append(x)
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    return mode, inputs


def kernels_of(graph: fx.GraphModule, backward: bool) -> tuple[list[Kernel], str]:
    """A graph's kernels in order, and Inductor's source."""
    mode, inputs = on_gpu(graph)
    with V.set_fake_mode(mode):
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
    lowering = GraphLowering(graph, example_inputs=inputs, is_backward=backward)
    with (
        V.set_graph_handler(lowering),
        V.set_fake_mode(mode),
        V.set_debug_handler(DebugContext()),
    ):
        lowering.run(*inputs)
        code, _ = lowering.codegen()
        kernels = [_kernel(node) for node in lowering.scheduler.nodes]
    # An op with several results has a node for each, which runs nothing.
    return [k for k in kernels if k.bytes], str(getattr(code, "value", code))


def _kernel(node: Any) -> Kernel:
    """One node of Inductor's scheduler."""
    ours = not node.is_extern()
    origins = {x.name for inner in node.get_nodes() for x in inner.node.get_origins()}
    name = "" if ours else getattr(node.node, "python_kernel_name", None)
    return Kernel(name or " ".join(sorted(origins)), ours, node.get_read_write_buffers_sizes())


def read_back(code: str) -> list[str]:
    """The kernels in Inductor's source that load what they stored before: between the two there is
    no barrier (fastlora/ops/gradient_barrier.py)."""
    found = []
    for name, body in re.findall(r"@triton\.jit\s+def (\w+)(.*?)(?=\n'{3}|\Z)", code, re.DOTALL):
        stored: set[str] = set()
        for verb, place in re.findall(r"tl\.(load|store)\((\w+)", body):
            if verb == "load" and place in stored:
                found.append(name)
                break
            stored |= {place} if verb == "store" else set()
    return found


def report(title: str, kernels: list[Kernel]) -> str:
    """A kernel a line."""
    written = [k for k in kernels if k.ours]
    microseconds = lambda k: k.bytes / BANDWIDTH * 1e6
    total = sum(map(microseconds, written))
    lines = [f"\n{title}: {len(written)} kernels of Inductor's, at least {total:.0f} us"]
    lines += [f"{'MiB':>8}{'us':>8}  what"]
    for k in kernels:
        took = f"{microseconds(k):.1f}" if k.ours else ""
        lines += [f"{k.bytes / 2**20:>8.1f}{took:>8}  {k.name[:110]}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_layer_arguments(parser)
    parser.add_argument("--recompute", choices=LEVELS[:-1], default="none")
    parser.add_argument("--code", type=Path, help="write Inductor's source here")
    args = parser.parse_args()
    library = attention_ops()  # its ops live as long as this does
    sources = []
    with an_h100():
        for title, graph in zip(("forward", "backward"), traced(args), strict=True):
            kernels, code = kernels_of(graph, title == "backward")
            print(report(title, kernels))
            sources.append(code)
    for name in read_back("\n".join(sources)):
        print(f"reads back what it stored: {name}")
    if args.code:
        args.code.write_text("\n".join(sources))
    del library


if __name__ == "__main__":
    main()
