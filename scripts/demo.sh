#!/usr/bin/env bash
# Fine-tune the demo model in the package. Needs no network once the packages are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
environment demo scripts/requirements.txt
exec python scripts/finetune.py "$@"
