"""Linear layers with frozen weights.

frozen.py has no adapter, lora.py one, lora_group.py several layers of one input, masked_lora.py
adapters under dropout, experts.py and group_products.py groups of rows, stacked_lora.py an adapter
for each group, group_gradients.py a gradient for each group. fp8.py has their products with a
matrix in e4m3. dora.py and merged_weight.py work on the sum W + s B A; qat.py multiplies with its
fake-quantised form.
"""
