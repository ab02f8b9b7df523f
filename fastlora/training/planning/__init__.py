"""plan(): the recompute policy that fits a card, predicted from shapes.

layers.py says what each layer keeps and computes, memory.py predicts the peak memory of a step,
time.py its duration, ranks.py the transfers of several ranks, and plan.py chooses.
"""
