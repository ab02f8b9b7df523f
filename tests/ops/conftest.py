"""Fixtures for the tests of the operators."""

import pytest
import torch


class StraightFloat8(torch.autograd.Function):
    """torchao's _RoundToFloat8, but with a float32 result, so gradients are not rounded."""

    @staticmethod
    def forward(ctx, x, dtype):
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


@pytest.fixture
def straight_float8(monkeypatch):
    """Disables torchao's cast of gradients to float8."""
    path = "torchao.quantization.quant_primitives._RoundToFloat8"
    monkeypatch.setattr(path, StraightFloat8)
