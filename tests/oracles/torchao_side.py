"""torchao as the oracle of quantisation-aware training. Without torchao, importing modules skip."""

from typing import Any

import pytest
import torch
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerRow,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.qat import QATConfig

pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao==0.18.0")

INT8 = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))

CONFIGS = {
    "int4": Int4WeightOnlyConfig(group_size=128),
    "int8": INT8,
    "fp8-int4": Float8DynamicActivationInt4WeightConfig(),
    "fp8-fp8": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    "int8-int4": Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    ),
}


def prepare(module: torch.nn.Module, scheme: str) -> torch.nn.Module:
    """The module, every linear layer in it (for int8-int4 every embedding too) fake quantised."""
    if scheme == "int8-int4":
        embedding = lambda m, _: isinstance(m, torch.nn.Embedding)
        quantize_(module, QATConfig(INT8, step="prepare"), filter_fn=embedding)
    quantize_(module, QATConfig(CONFIGS[scheme], step="prepare"))
    return module


def prepared_linear(weight: torch.Tensor, bias: torch.Tensor | None, scheme: str) -> Any:
    """torchao's layer with these weights."""
    linear = torch.nn.Linear(*reversed(weight.shape), bias=bias is not None, dtype=weight.dtype)
    linear.weight = torch.nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias.clone())
    return prepare(torch.nn.Sequential(linear), scheme)[0]
