"""Training: rows of data in, a model with a trained adapter and its history out.

In reading order: loop.py holds train() and its loop; settings.py the arguments and the checks on
them; run.py the encoded data and the micro-batches of every step; learner.py the adapter, its
optimizer (optimizers.py, custom_optimizer.py) and its gradient; step.py one optimizer step, with
its learning rates (schedules.py, parameter_groups.py), and evaluation; nonfinite.py finds where a
NaN comes from; history.py the figures of every step, progress.py what a step cost, samples.py the
texts of evaluations, and logging/ writes and draws them. rate_range.py tests learning rates.

The run on disk: identity.py tells whether two runs are the same; checkpoint.py saves and restores;
keeping.py decides which checkpoints stay and which step is the best; output_folder.py checks what a
folder holds, lock.py locks it; signals.py ends a run after its step; recovery.py saves the state
of a run that fails. finished.py writes what a finished run leaves, with run_record.py and
model_card.py. planning/ predicts memory and time of a step.
"""
