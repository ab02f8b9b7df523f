"""GGUF files for llama.cpp, Ollama and LM Studio: merged models, and LoRA adapters.

model_file.py      save_gguf(): the model with its adapter merged
adapter_file.py    save_gguf_adapter(): the adapter alone
ollama.py          save_ollama(): both, and a Modelfile
tensors.py         names, rows and parts of tensors in the file
metadata.py        the settings of a model, and what its architecture does not compute
vocabulary.py      the tokenizer's entries
pre_tokenizers.py  llama.cpp's names for ways to split a text
sentencepiece.py   merges of a SentencePiece-like tokenizer as scores
output.py          may this file be written?
packages.py        imports of the extra
write.py           quantises and writes one tensor at a time
verify.py          runs a written file in llama.cpp and compares
report.py          what the functions return
methods.py         the same as methods of Model
go_template.py     chat templates in Go
"""
