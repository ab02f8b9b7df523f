"""Generation: tokens of many rows at a time, with cached keys and values.

prepare.py       everything that is the same for all tokens, computed once
cache.py         one slot of keys and values for each row
forward.py       prefill for prompts, decode for one more token of every row
prefixes.py      prompts into the cache, each distinct one once
angles.py        RoPE's cosines and sines
layer_parts.py   a layer's projections as parts of products
kernel_layer.py  a layer as products: Triton's in a decode step, torch's for prompts
sampling.py      from logits to the next token, with settings of each row
host_rows.py     rows as the host knows them
rows.py          the state of all rows on the device, and one step
step_graph.py    a step as a CUDA graph
engine.py        rows join, go on and leave
nonfinite.py     the error of a row whose logits are NaN
generate.py      one batch of prompts
many.py          many prompts, as an iterator
batch_size.py    how many rows fit into the memory
text.py          prompts to ids, and ids to text as they arrive
"""
