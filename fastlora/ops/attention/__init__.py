"""Causal attention: attention.py calls SDPA, flash.py our own Triton kernels; rope.py rotates."""
