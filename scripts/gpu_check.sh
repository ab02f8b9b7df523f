#!/usr/bin/env bash
# What CI cannot show: compiled bf16 on a CUDA GPU. Needs torch, transformers, peft and bitsandbytes;
# prints two tables.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:tests${PYTHONPATH:+:$PYTHONPATH}"
python3 scripts/gpu_check.py "$@"
python3 scripts/gpu_check_4bit.py
