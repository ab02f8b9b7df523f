"""One record per model family: how its config.json, files and tokenizer differ from the others.

`family.py` defines the record, one file per family fills it in, and `registry.py` lists them. A new
family is one new file here and one entry in the registry.
"""
