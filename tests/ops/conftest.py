"""Fixtures of the operators' tests."""

import pytest
import torch


class StraightFloat8(torch.autograd.Function):
    """torchao's _RoundToFloat8 with a result in float32, through which gradients pass whole."""

    @staticmethod
    def forward(ctx, x, dtype):
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


@pytest.fixture
def straight_float8(monkeypatch):
    """torchao without its cast of gradients to float8."""
    path = "torchao.quantization.quant_primitives._RoundToFloat8"
    monkeypatch.setattr(path, StraightFloat8)
