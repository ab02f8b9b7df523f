"""The tensors of a GGUF file: their names, the order of rows, and matrices in parts."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from fastlora.formats.gguf.packages import gguf_package
from fastlora.models.config import LlamaConfig
from fastlora.models.families.family import GGUF
from fastlora.models.names import base_tensors, expert_matrices, projection_path
from fastlora.models.params import EXPERTS
from fastlora.ops.rms_norm import norm_factor

# The matrices of one expert, as llama.cpp's table of names spells them.
_EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")


class FileTensor(NamedTuple):
    """One tensor of a file."""

    name: str  # in the file
    shape: tuple[int, ...]  # as torch has it; GGUF writes the reverse
    compute: Callable[[], Tensor]


def file_names(config: LlamaConfig, gguf: GGUF) -> Callable[[str], str]:
    """A function from a name on disk to the name in the file, without or with ".weight"."""
    package = gguf_package()
    arch = next(key for key, name in package.MODEL_ARCH_NAMES.items() if name == gguf.arch)
    table = package.get_tensor_name_map(arch, config.num_hidden_layers)

    def name_in_file(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"{gguf.arch} has no name for {name}"
        return found

    return name_in_file


def file_tensors(
    config: LlamaConfig, gguf: GGUF, compute: Callable[[str], Tensor]
) -> Iterator[FileTensor]:
    """Every tensor of a model's file, in the order in which it is written.

    Args:
        config: the merged model's.
        gguf: its architecture.
        compute: name on disk -> the tensor.
    """
    name_in_file = file_names(config, gguf)
    in_file_order = lambda name: file_rows(config, gguf, name, compute(name))
    for name, shape in base_tensors(config).items():
        if name.endswith(EXPERTS):
            yield from _expert_tensors(config, name, name_in_file, compute)
            continue
        for part, rows in row_parts(gguf, name, shape[0]):
            computed = lambda name=name, rows=rows: in_file_order(name)[rows]
            yield FileTensor(name_in_file(part), (rows.stop - rows.start, *shape[1:]), computed)


def _expert_tensors(
    config: LlamaConfig,
    name: str,
    name_in_file: Callable[[str], str],
    compute: Callable[[str], Tensor],
) -> Iterator[FileTensor]:
    """The matrices of all experts, gate and up apart: [e, 2f, d] becomes two of [e, f, d]."""
    module, _, fused = name.rpartition(".")
    for kind, rows, shape in expert_matrices(config, f"experts.{fused}"):
        full = (config.num_local_experts, *shape)
        in_file = name_in_file(f"{module}.{_EXPERT_NAMES[kind]}.weight")
        yield FileTensor(in_file, full, lambda rows=rows: compute(name)[:, rows])


def file_rows(
    config: LlamaConfig, gguf: GGUF, name: str, x: Float[Tensor, "d_out *rest"]
) -> Float[Tensor, "d_out *rest"]:
    """A tensor as the file has it: the rows of q and k move if only llama.cpp turns neighbours, and
    the weights of norms that multiply with 1 + weight are written as 1 + weight.

    Within each head, rows i and i + head_dim / 2 become rows 2 i and 2 i + 1.

    Args:
        config: the model's.
        gguf: its architecture.
        name: on disk: "model.layers.0.self_attn.q_proj.weight".
        x: weight, bias, or the B of an adapter.
    """
    if config.norm_kind == "one_plus" and name.endswith("norm.weight"):
        return norm_factor(x, "one_plus")
    if gguf.rope_of_neighbours == config.rope_of_neighbours or not _is_rotated(name):
        return x
    assert gguf.rope_of_neighbours, f"{gguf.arch} does not turn neighbours, but {name} needs it"
    halves = x.unflatten(0, (-1, 2, config.head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def row_parts(gguf: GGUF, name: str, d_out: int) -> list[tuple[str, slice]]:
    """The tensors of the file that one tensor of the model becomes; of most it is one.

    "model.layers.3.shared_mlp.input_linear.weight" with 2 f rows of Granite 4
    ->  [("model.layers.3.mlp.gate_proj.weight", slice(0, f)),
         ("model.layers.3.mlp.up_proj.weight", slice(f, 2 * f))]

    Args:
        gguf: the model's architecture.
        name: on disk.
        d_out: rows of the tensor.

    Returns:
        (a name on disk, which has a name in the file; rows).
    """
    *prefix, module, kind = name.split(".")
    parts = dict(gguf.parts).get(module)
    if parts is None:
        return [(name, slice(0, d_out))]
    layer, rows = int(prefix[2]), d_out // len(parts)
    return [
        (f"{projection_path(layer, part)}.{kind}", slice(i * rows, (i + 1) * rows))
        for i, part in enumerate(parts)
    ]


def _is_rotated(name: str) -> bool:
    return any(part in ("q_proj", "k_proj") for part in name.split("."))


def expert_parts(config: LlamaConfig, layer: int, target: str) -> Iterator[tuple[str, Any]]:
    """(name on disk, rows of B) for the matrices that one tensor of experts is in the file."""
    module = projection_path(layer, target).rpartition(".")[0]
    for kind, rows, _ in expert_matrices(config, target):
        yield f"{module}.{_EXPERT_NAMES[kind]}.weight", rows
