"""expert_layout."""

import re
from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.models.config import LlamaConfig
from fastlora.models.names import EXPERT_SPELLINGS, expert_matrices, is_mixture, projection_path
from fastlora.models.params import EXPERTS
from fastlora.models.spec import LoraConfig, Target

# ── 3. an adapter's files ─────────────────────────────────────────────────────────────────
# PEFT wraps the module that holds a parameter, once for each parameter, in the order they are
# registered: of gate_up_proj and down_proj the first is the inner one, and only the nesting says
# which is which. A is expert-major [e * r, d_in], B rank-major [d_out, r * e].
PREFIX = "base_model.model."  # of all of PEFT's keys


def adapter_path(layer: int, name: str, adapted: Collection[str]) -> str:
    """Module name of a target's A and B, in a layer that adapts the targets `adapted`."""
    if name not in EXPERTS:
        return projection_path(layer, name)
    module = projection_path(layer, name).rpartition(".")[0]
    inner = name == EXPERTS[0] and EXPERTS[1] in adapted
    return f"{module}.base_layer" if inner else module


def packed(key: str, leaf: Float[Tensor, "e _ _"]) -> Float[Tensor, "_ _"]:
    """An ExpertLoRA's a or b as PEFT's matrix, which of the two the key says."""
    return leaf.flatten(0, 1) if _is_a(key) else leaf.permute(1, 2, 0).flatten(1)


def unpacked(key: str, matrix: Float[Tensor, "_ _"], experts: int) -> Float[Tensor, "e _ _"]:
    """PEFT's matrix as an ExpertLoRA's a or b: a view."""
    if _is_a(key):
        return matrix.view(experts, -1, matrix.shape[1])
    return matrix.view(matrix.shape[0], -1, experts).permute(2, 0, 1)


def _is_a(key: str) -> bool:
    return key.endswith("lora_A.weight")


def packed_shape(field: str, r: int, shape: tuple[int, int], experts: int) -> tuple[int, int]:
    """The shape of `packed`, for experts' matrices of `shape`."""
    d_out, d_in = shape
    return (r * experts, d_in) if field == "a" else (d_out, r * experts)


def fuse_adapter(
    tensors: Mapping[str, Tensor], lora: LoraConfig, config: LlamaConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors under PEFT's present names, problems), from a file that may spell every expert.

    Of gate and up of an expert, A is stacked and B block-diagonal, so that each keeps its own rank.
    """
    if not is_mixture(config):
        return dict(tensors), []
    module, _ = EXPERT_SPELLINGS[config.model_type]
    one_by_one = re.compile(rf"{re.escape(PREFIX)}model\.layers\.\d+\.{module}\.experts\.\d+\.")
    spelled = {k for k in tensors if one_by_one.match(k)}
    fused = {k.replace(f".{module}.", ".mlp."): t for k, t in tensors.items() if k not in spelled}
    problems, used = [], set()
    for layer, targets in enumerate(lora.targets if spelled else ()):
        adapted = [t.name for t in targets]
        for target in targets:
            if target.name not in EXPERTS:
                continue
            expected = _expert_shapes(config, layer, target)
            wrong = _differences(tensors, expected)
            problems += wrong
            used |= expected.keys()
            if not wrong:
                path = PREFIX + adapter_path(layer, target.name, adapted)
                a, b = _stacked(tensors, expected, config.num_local_experts)
                for key, leaf in ((f"{path}.lora_A.weight", a), (f"{path}.lora_B.weight", b)):
                    fused[key] = packed(key, leaf)
    return fused, problems + [f"unexpected  {k}" for k in sorted(spelled - used)]


def _expert_shapes(config: LlamaConfig, layer: int, target: Target) -> dict[str, tuple[int, int]]:
    """Key -> shape, expert by expert, A before B, gate before up."""
    module, spelled = EXPERT_SPELLINGS[config.model_type]
    matrices = list(expert_matrices(config, target.name))
    r = target.r // len(matrices)
    return {
        f"{PREFIX}model.layers.{layer}.{module}.experts.{e}.{spelled[m]}.lora_{side}.weight": s
        for e in range(config.num_local_experts)
        for m, _, (d_out, d_in) in matrices
        for side, s in (("A", (r, d_in)), ("B", (d_out, r)))
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


def _stacked(
    tensors: Mapping[str, Tensor], keys: Collection[str], experts: int
) -> tuple[Float[Tensor, "e r d_in"], Float[Tensor, "e d_out r"]]:
    found = [tensors[k] for k in keys]
    each = len(found) // experts
    parts = [found[i : i + each] for i in range(0, len(found), each)]
    a = torch.stack([torch.cat(part[0::2]) for part in parts])
    return a, torch.stack([torch.block_diag(*part[1::2]) for part in parts])
