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
set -m  # pyright gets a process group, which is ended as a whole if this script ends first
pyright >"$types" 2>&1 </dev/null & pyright=$!
set +m
trap 'kill -- "-$pyright" 2>/dev/null || true; rm -f "$types"' EXIT
peer torchtune
peer unsloth
peer triton
wait "$chromium" || { echo "Chromium could not be installed, see the first lines" >&2; exit 1; }
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
hook="--jaxtyping-packages=fastlora,beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
python -m pytest -n 2 -m "not compile" "$hook" "$@" || { status=$?; cat "$types"; exit "$status"; }
wait "$pyright" || { cat "$types"; exit 1; }
cat "$types"
python -m pytest -n 2 -m compile "$@"
