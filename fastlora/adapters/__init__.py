"""Adapters: attaching one to a model, its first values, and edits of models that have one.

Attaching: create.py (`lora`), lora_arguments.py and refusals.py (checks of its arguments),
targets.py (which modules are adapted) with patterns.py, unmatched.py and expert_targets.py,
extras.py (what is trained besides), parked_originals.py. First values: init/, init_from_data/.
`merge`, `combine`, `disable`, `quantize`, `add_tokens`: edits/. README.md explains each argument.
"""
