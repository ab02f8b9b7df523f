"""Training: rows of data in, a model with a trained adapter and its history out.

In reading order: loop.py holds train() and its loop; settings.py the arguments and the checks on
them; run.py the encoded data and the micro-batches of every step; learner.py the adapter, its
optimizer (optimizers.py) and its gradient; step.py one optimizer step, and evaluation;
nonfinite.py finds where a NaN comes from; history.py the figures of every step.

The run on disk: identity.py tells whether two runs are the same; checkpoint.py saves and restores;
output_folder.py checks what a folder holds, lock.py locks it; signals.py ends a run after its step,
and recovery.py saves the state of a run that fails. planning/ predicts memory and time of a step.
"""
