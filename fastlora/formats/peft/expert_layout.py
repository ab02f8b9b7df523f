"""Adapters of experts, as PEFT stores them, and how files name every expert.

PEFT adapts the tensor of all experts as one parameter, and stores A and B as matrices:

    tree  ExpertLoRA(a [e, r, d_in], b [e, d_out, r])
    file  lora_A.weight [e * r, d_in]    expert by expert
          lora_B.weight [d_out, r * e]   rank by rank: column i * e + j is column i of expert j's B

It wraps the module of a parameter, once for each adapted parameter, in the order in which they are
registered. If both gate_up_proj and down_proj are adapted, gate_up_proj is the inner one, and only
the nesting tells them apart:

    ...mlp.experts.base_layer.lora_A.weight     experts.gate_up_proj
    ...mlp.experts.lora_A.weight                experts.down_proj

Older files name every expert and matrix (`fuse_adapter`).
"""

import re
from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.models.config import LlamaConfig
from fastlora.models.names import expert_matrices, expert_spelling, is_mixture, projection_path
from fastlora.models.params import EXPERTS
from fastlora.models.spec import LoraConfig, Target

PREFIX = "base_model.model."  # every key of a PEFT file begins with it


def adapter_path(layer: int, name: str, adapted: Collection[str]) -> str:
    """PEFT's module name for a target, in a layer in which the targets `adapted` are adapted."""
    if name not in EXPERTS:
        return projection_path(layer, name)
    module = projection_path(layer, name).rpartition(".")[0]
    inner = name == EXPERTS[0] and EXPERTS[1] in adapted
    return f"{module}.base_layer" if inner else module


def pack_experts(key: str, leaf: Float[Tensor, "e _ _"]) -> Float[Tensor, "_ _"]:
    """An ExpertLoRA's a or b as PEFT's matrix. The key says which of the two it is."""
    return leaf.flatten(0, 1) if _is_a(key) else leaf.permute(1, 2, 0).flatten(1)


def unpack_experts(key: str, matrix: Float[Tensor, "_ _"], experts: int) -> Float[Tensor, "e _ _"]:
    """The inverse of `pack_experts`, as a view of the matrix."""
    if _is_a(key):
        return matrix.view(experts, -1, matrix.shape[1])
    return matrix.view(matrix.shape[0], -1, experts).permute(2, 0, 1)


def _is_a(key: str) -> bool:
    return key.endswith("lora_A.weight")


def packed_shape(field: str, r: int, shape: tuple[int, int], experts: int) -> tuple[int, int]:
    """The shape of `pack_experts` of field "a" or "b", for experts whose matrices have `shape`."""
    d_out, d_in = shape
    return (r * experts, d_in) if field == "a" else (d_out, r * experts)


def fuse_adapter(
    tensors: Mapping[str, Tensor], lora: LoraConfig, config: LlamaConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename a file's tensors to PEFT's present names. Returns (tensors, problems).

    Gate and up of an expert become one matrix. A is stacked and B is block-diagonal, so that each
    keeps its own rank:

        experts.3.w1.lora_A [r, d], .lora_B [f, r]  \\      A = [A1; A3]        [2r, d]
        experts.3.w3.lora_A [r, d], .lora_B [f, r]  /  ->  B = [B1 0; 0 B3]    [2f, 2r]

    In other keys only the module's old name changes ("block_sparse_moe" to "mlp"). Files of models
    without experts are returned unchanged.
    """
    if not is_mixture(config):
        return dict(tensors), []
    module = expert_spelling(config).module
    one_by_one = re.compile(rf"{re.escape(PREFIX)}model\.layers\.\d+\.{module}\.experts\.\d+\.")
    # transformers 4 had a linear layer for every expert and matrix, and PEFT adapted each of them.
    legacy = {k for k in tensors if one_by_one.match(k)}
    fused = {k.replace(f".{module}.", ".mlp."): t for k, t in tensors.items() if k not in legacy}
    problems, used = [], set()
    for layer, targets in enumerate(lora.targets if legacy else ()):
        adapted = [t.name for t in targets]
        for target in targets:
            if target.name not in EXPERTS:
                continue
            expected = _legacy_shapes(config, layer, target)
            wrong = _differences(tensors, expected)
            problems += wrong
            used |= expected.keys()
            if not wrong:
                path = PREFIX + adapter_path(layer, target.name, adapted)
                a, b = _stack_experts(tensors, expected, config.num_local_experts)
                for key, leaf in ((f"{path}.lora_A.weight", a), (f"{path}.lora_B.weight", b)):
                    fused[key] = pack_experts(key, leaf)
    return fused, problems + [f"unexpected  {k}" for k in sorted(legacy - used)]


def _legacy_shapes(config: LlamaConfig, layer: int, target: Target) -> dict[str, tuple[int, int]]:
    """Key -> shape of every expert's A and B; A before B, gate before up, expert by expert."""
    module, matrix_names = expert_spelling(config)[:2]
    matrices = list(expert_matrices(config, target.name))
    # The fused adapter of gate and up has the ranks of both.
    r = target.r // len(matrices)
    prefix = f"{PREFIX}model.layers.{layer}.{module}.experts"
    return {
        f"{prefix}.{e}.{matrix_names[m]}.lora_{side}.weight": shape
        for e in range(config.num_local_experts)
        for m, _, (d_out, d_in) in matrices
        for side, shape in (("A", (r, d_in)), ("B", (d_out, r)))
    }


def _differences(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, int]]
) -> list[str]:
    problems = [f"missing     {k} {s}" for k, s in expected.items() if k not in tensors]
    return problems + [
        f"shape       {k}: file has {tuple(tensors[k].shape)}, the config says {s}"
        for k, s in expected.items()
        if k in tensors and tuple(tensors[k].shape) != s
    ]


def _stack_experts(
    tensors: Mapping[str, Tensor], keys: Collection[str], experts: int
) -> tuple[Float[Tensor, "e r d_in"], Float[Tensor, "e d_out r"]]:
    """(a, b) of an ExpertLoRA, from tensors in the order of `_legacy_shapes`."""
    ordered = [tensors[k] for k in keys]
    per_expert = len(ordered) // experts
    # A part is [A, B] of one matrix, or [A, B, A, B] of gate and up.
    parts = [ordered[i : i + per_expert] for i in range(0, len(ordered), per_expert)]
    a = torch.stack([torch.cat(part[0::2]) for part in parts])
    return a, torch.stack([torch.block_diag(*part[1::2]) for part in parts])
