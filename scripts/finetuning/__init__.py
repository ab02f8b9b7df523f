"""The parts of scripts/finetune.py.

options.py   the command line and the TOML file, from the arguments of fastlora.lora and train
held_out.py  rows to train on and to evaluate on; the loss of held-out rows
toml.py      resolved options as TOML
repeat.py    options from a run.json, and what differs when its run is repeated
forecast.py  what fastlora.plan predicts, as text
ending.py    exit codes and messages of errors, for other scripts too
bytecode.py  Python's bytecode of torch, kept if it is not kept beside torch
"""
