"""Functions that make another model of one or several: merging.py (`merge`), combining.py
(`combine`, `disable`; checks in combine_checks.py), quantization.py, vocabulary.py (`add_tokens`).
"""
