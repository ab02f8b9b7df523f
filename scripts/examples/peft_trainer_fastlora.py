# %% [markdown]
# # The run of `peft_trainer.py` with fastlora
#
# Encoding, masks, collation and the Trainer become arguments of `fastlora.train`.

# %%
import json
from pathlib import Path

import fastlora
from fastlora.checkpoints.hub import DEMO as MODEL

# %% [markdown]
# ## Model and adapter

# %%
base, tokenizer = fastlora.load(MODEL, dtype="float32", device="cpu")
model = fastlora.lora(base, r=8, lora_alpha=16)  # all seven projections are the default
start = Path("runs/peft_trainer/start")
if start.exists():  # the A of the other script, for equal losses
    model = fastlora.load_adapter(base, start)
model.print_trainable_parameters()

# %% [markdown]
# ## Training

# %%
rows = [json.loads(line) for line in open(MODEL / "train.jsonl")][:80]
model, history = fastlora.train(
    model,
    tokenizer,
    rows,
    max_steps=20,
    batch_size=4,
    learning_rate=2e-3,
    lr_scheduler="linear",
    warmup_ratio=0.1,
    weight_decay=0.01,
    packing=False,
)
losses = history.losses
print(*(f"{loss:.4f}" for loss in losses))

# %% [markdown]
# ## A reply, and the adapter

# %%
print(model.generate_text(tokenizer, rows[0]["messages"][:1], max_new_tokens=16))
model.save_pretrained("runs/peft_trainer/adapter_fastlora")
