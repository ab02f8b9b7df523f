#!/usr/bin/env bash
# Run the checks of tests/gpu on a CUDA GPU, which CI does not have. Each prints rows of a law, its
# value and its limit. With OUT set, the rows are also written to $OUT/gpu_rows_<process>.txt.
#   bash scripts/gpu_check.sh [PART...]
#   PROCESSES=16 bash scripts/gpu_check.sh [PART...]   # needs pytest-xdist, and a core for each
# Parts: kernels, training, offload, fp8, 4bit-training, 4bit-llama3.2, 4bit-qwen2, and each family
# of tests/oracles/gpu_models.py, such as llama3.2 or gemma2. Without PART all of them run. Most of
# the time is compilation. Needs torch, transformers, peft, bitsandbytes and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 - <<'PYTHON'
from importlib.util import find_spec

needed = ("torch", "transformers", "peft", "bitsandbytes", "pytest")
if missing := [name for name in needed if find_spec(name) is None]:
    raise SystemExit(f"gpu_check.sh needs {', '.join(missing)}: pip install {' '.join(missing)}")
import torch

if not torch.cuda.is_available():
    raise SystemExit("gpu_check.sh needs a CUDA GPU; torch finds none here.")
print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
PYTHON
given=(-m gpu -s -p no:cacheprovider "${@/#/--part=}")
if [ "${PROCESSES:-1}" = 1 ]; then
    exec python3 -m pytest tests/gpu "${given[@]}"
fi
# One thread each: the processes share the cores.
export GPU_CHECK_START=$(date +%s) TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=1
python3 -m pytest tests/gpu --ignore tests/gpu/test_inductor.py "${given[@]}" \
    -n "$PROCESSES" --dist load --maxschedchunk 1 -rf --durations 30 && status=0 || status=$?
# This one reads what all others compiled.
python3 -m pytest tests/gpu/test_inductor.py "${given[@]}" && exit "$status"
