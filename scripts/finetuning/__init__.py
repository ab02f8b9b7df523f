"""The parts of scripts/finetune.py.

options.py   the command line and the TOML file, from the arguments of fastlora.lora and train
toml.py      resolved options as TOML
repeat.py    options from a run.json, and what differs when its run is repeated
forecast.py  what fastlora.plan predicts, as text
ending.py    exit codes
"""
