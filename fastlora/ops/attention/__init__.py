"""Causal attention through SDPA (attention.py) or our Triton kernels (flash.py); RoPE (rope.py)."""
