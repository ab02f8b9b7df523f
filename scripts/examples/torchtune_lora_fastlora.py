# %% [markdown]
# # The run of `torchtune_lora.py` with fastlora
#
# Sizes, tokenizer and chat template are read from the checkpoint.

# %%
import json
from pathlib import Path

import fastlora
from fastlora.checkpoints.hub import DEMO

# %%
rows = [json.loads(line) for line in open(DEMO / "train.jsonl")][:80]
base, tokenizer = fastlora.load(DEMO, dtype="float32", device="cpu", max_seq_length=512)
model = fastlora.lora(base, r=8, lora_alpha=16)  # all seven projections are the default
start = Path("runs/torchtune_lora/start/epoch_0")
if start.exists():  # the A of the other script, for equal losses
    model = fastlora.load_adapter(base, start)

# %%
model, history = fastlora.train(
    model,
    tokenizer,
    rows,
    num_epochs=1,
    batch_size=4,
    learning_rate=2e-3,
    lr_scheduler="cosine",
    warmup_ratio=0.1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    packing=False,
)
losses = history.losses
print(*(f"{loss:.4f}" for loss in losses))

# %% [markdown]
# ## The adapter, in the format that torchtune writes too

# %%
model.save_pretrained("runs/torchtune_lora/adapter_fastlora")
