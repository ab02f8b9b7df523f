"""Training: rows of data in, a model with a trained adapter and its history out.

In reading order: loop.py holds train() and its loop; settings.py the arguments and the checks on
them; run.py the encoded data and the micro-batches of every step; learner.py the adapter, its
optimizer (optimizers.py) and its gradient; step.py one optimizer step, and evaluation;
checkpoint.py saving and resuming; history.py the figures of every step. planning/ predicts the
memory and time of a step.
"""
