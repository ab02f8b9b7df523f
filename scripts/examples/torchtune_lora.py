# %% [markdown]
# # torchtune's LoRA recipe
#
# `torchtune_lora.yaml` is torchtune's recipe for Llama 3.2 on one device, and
# `torchtune_lora_fastlora.py` the same run with fastlora. The losses of all 20 steps are equal to
# 1e-4: rows, their order, the first adapter and all settings are the same, in float32.
#
# `pip install torchtune==0.6.1 torchao==0.9.0`: torchtune is no longer developed, and its last
# version needs a module (`torchao.dtypes.nf4tensor`) that torchao 0.18 does not have. Run this in
# a separate environment, from the folder of this file, or with that folder on PYTHONPATH.

# %%
import re
import subprocess
from pathlib import Path

import numpy as np

from fastlora.checkpoints.hub import DEMO

# %% [markdown]
# ## Rows
#
# The rows are put into the order in which fastlora takes them.

# %%
runs = Path("runs/torchtune_lora")
runs.mkdir(parents=True, exist_ok=True)
rows = (DEMO / "train.jsonl").read_text().splitlines()[:80]
order = np.random.default_rng([3407, 0]).permutation(len(rows))
(runs / "rows.jsonl").write_text("\n".join(rows[i] for i in order) + "\n")


# %% [markdown]
# ## Training
#
# The first step of a warm-up has learning rate 0, so a run of one step writes the first adapter.
# The twin starts from it.


# %%
def tune(output_dir: Path, *overrides: str) -> None:
    recipe = ["tune", "run", "lora_finetune_single_device", "--config", "torchtune_lora.yaml"]
    subprocess.run([*recipe, f"demo={DEMO}", f"output_dir={output_dir}", *overrides], check=True)


tune(runs / "start", "max_steps_per_epoch=1")
tune(runs / "out")
(log,) = (runs / "out").rglob("losses.txt")
losses = [float(x) for x in re.findall(r"loss:([\d.]+)", log.read_text())]
print(*(f"{loss:.4f}" for loss in losses))
