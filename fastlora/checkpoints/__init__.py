"""Checkpoint files: a base model's weights between disk and tree, checked before use.

hub.py               a folder's path, or a download from the Hugging Face Hub
atomic.py            files that are written completely or not at all
tensors.py           JSON and safetensors files
output_folders.py    whether a model may be written to a folder
weight_files.py      the tensors of a folder, one file or shards
expert_layout.py     names of a mixture's tensors
bnb_format.py        parts of a weight in 4 or 8 bits;  bnb_reading.py checks and reads them
reading.py           read_base(): a folder -> config and base tree
unquantized.py       the 16-bit matrices that a quantised base was made from
"""
