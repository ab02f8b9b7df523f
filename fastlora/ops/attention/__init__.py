"""Causal attention through SDPA (attention.py) or our Triton kernels (flash.py); RoPE (rope.py);
a part of a row's queries over the keys of all ranks (part_attention.py, context_group.py)."""
