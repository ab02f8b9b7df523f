"""plan(): the recompute policy that fits a card, predicted from shapes.

memory.py predicts the peak memory of a step, time.py its duration, and plan.py chooses.
"""
