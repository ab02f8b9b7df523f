"""First values of A and B: drawn at random (random.py), or computed from the base's weights.

methods.py lists the values of `init_lora_weights`. from_weights.py computes PiSSA's, OLoRA's and
LoftQ's factors with decompositions.py and loftq.py; loftq_4bit.py is LoftQ over a quantised base.
"""
