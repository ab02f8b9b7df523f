#!/usr/bin/env bash
# Run what CI runs: lint, types, tests with shape checks, and tests under torch.compile.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
environment test scripts/requirements-test.txt
install_chromium
peer torchtune
peer unsloth
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ruff check fastlora tests scripts
ruff format --check fastlora tests scripts
pyright
hook="--jaxtyping-packages=fastlora,beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
python -m pytest -n 2 -m "not compile" "$hook" "$@"
python -m pytest -n 2 -m compile "$@"
