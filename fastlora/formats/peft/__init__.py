"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors.

names.py             the adapter tree <-> names of tensors in the file
expert_layout.py     adapters of mixtures of experts
base_tensors.py      a base's embedding and head in an adapter's file
config_writing.py    LoraConfig -> adapter_config.json;  config_reading.py is the other direction
writing.py           save_adapter, push_to_hub
reading.py           load_adapter;  restoring.py  restore_adapter, for runs that resume
"""
