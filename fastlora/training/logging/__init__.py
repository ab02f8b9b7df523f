"""Watching a run: its figures to files, TensorBoard, Weights & Biases, trackio, and as a picture.

open.py turns the `log` argument of `train` into one function; backends.py has one writer for each
name; figures.py draws histories; extras.py imports what the extras of the package install.
"""
