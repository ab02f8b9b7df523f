"""Parts of scripts/bench/multi_gpu.py."""
