"""Several runs in one pass over one base: what `train` does with a list of models.

arguments.py gives each run its own arguments; prepare.py makes the runs; loop.py runs them. In a
pass, batches.py joins the batches of all runs, stack.py computes losses and gradients with one
stack of adapters, and step.py updates each adapter with its own optimizer.
"""
