"""The model: a Llama-like decoder as pure functions over two trees of tensors, base and adapter.

Records: config.py (the shape), spec.py (how to run), params.py (the trees), state.py (all three).
The decoder, from the outside in: decoder.py, layer.py, attention.py and mlp.py (experts.py),
projections.py; embedding.py and head.py at its two ends. levels.py chooses what is recomputed.
Trees: names.py (tensors on disk), fused_qkv.py, init_offset.py, self_contained.py.
Reading config.json: families/, config_json.py, rope_json.py, json_fields.py.
"""
