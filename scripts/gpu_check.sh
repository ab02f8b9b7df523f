#!/usr/bin/env bash
# What CI cannot show: compiled bf16 on a CUDA GPU. Needs torch, transformers and peft; prints one table.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:tests${PYTHONPATH:+:$PYTHONPATH}"
exec python3 scripts/gpu_check.py "$@"
