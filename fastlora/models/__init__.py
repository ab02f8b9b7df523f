"""The model: a Llama-like decoder as pure functions over two trees of tensors, base and adapter.

Records: config.py (the shape), spec.py (how to run), params.py (the trees), state.py (all three).
The decoder, from the outside in: decoder.py, layer.py, attention.py and mlp.py (experts.py),
projections.py; embedding.py at its start, head.py and head_logprobs.py (the loss) at its end.
levels.py chooses what is recomputed.
Several adapters in one batch: stacking.py makes a stack of them, each_row.py runs a function over
rows that use it, stacks.py has the rows' order and the layers' records.
Per-example gradients: examples.py.
Trees: names.py (tensors on disk), fused_qkv.py, init_offset.py, self_contained.py.
Reading config.json: families/, config_json.py, rope_json.py, json_fields.py.
"""
