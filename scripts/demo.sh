#!/usr/bin/env bash
# The main job: fine-tune the embedded demo model, offline once the packages are there.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
environment demo scripts/requirements.txt
exec python scripts/finetune.py "$@"
