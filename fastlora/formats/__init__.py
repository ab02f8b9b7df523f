"""Files for other programs: PEFT folders, Hugging Face folders of merged models, GGUF, mlx-lm.

peft/            adapters: load_adapter, save_adapter, push_to_hub
merged.py        save_merged(): the adapter merged into the base weights, in 16 or 4 bits
tensors_out.py   the tensors of a merged folder, computed one at a time while they are written
read_back.py     compares a written folder with the model
gguf/            save_gguf(), save_gguf_adapter(), save_ollama(): files for llama.cpp
mlx.py           save_mlx_adapter()
"""
