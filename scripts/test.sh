#!/usr/bin/env bash
# Run what CI runs: lint, types, tests with shape checks, and tests under torch.compile.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
# Two cores: what needs one of them runs beside something else.
install_chromium & chromium=$!
environment test scripts/requirements-test.txt
ruff check fastlora tests scripts
ruff format --check fastlora tests scripts
types=$(mktemp)
pyright >"$types" 2>&1 & pyright=$!
peer torchtune
peer unsloth
wait "$chromium"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
hook="--jaxtyping-packages=fastlora,beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
python -m pytest -n 2 -m "not compile" "$hook" "$@"
wait "$pyright" || { cat "$types"; exit 1; }
cat "$types"
python -m pytest -n 2 -m compile "$@"
