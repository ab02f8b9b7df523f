#!/usr/bin/env bash
# Build the API reference from the docstrings, into docs-html/index.html. Needs no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
environment demo scripts/requirements.txt  # pdoc is added to the demo environment
python -c "import pdoc" 2>/dev/null || pip install --quiet --disable-pip-version-check "pdoc>=15"
python -m pdoc --docformat google --output-directory docs-html fastlora
echo "wrote docs-html/index.html"
