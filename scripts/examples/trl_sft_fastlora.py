# %% [markdown]
# # The run of `trl_sft.py` with fastlora

# %%
import json
from pathlib import Path

import fastlora
from fastlora.checkpoints.hub import DEMO as MODEL

# %% [markdown]
# ## Rows, model and adapter

# %%
rows = [json.loads(line) for line in open(MODEL / "train.jsonl")][:80]
base, tokenizer = fastlora.load(MODEL, dtype="float32", device="cpu", max_seq_length=512)
model = fastlora.lora(base, r=8, lora_alpha=16)  # all seven projections are the default
start = Path("runs/trl_sft/start")
if start.exists():  # the A of the other script, for equal losses
    model = fastlora.load_adapter(base, start)

# %% [markdown]
# ## Training
#
# `train_on="responses"`, the default, is `assistant_only_loss=True`. It needs no `{% generation %}`
# block in the chat template.

# %%
model, history = fastlora.train(
    model,
    tokenizer,
    rows,
    max_steps=20,
    batch_size=4,
    learning_rate=2e-3,
    lr_scheduler="cosine",
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
model.save_pretrained("runs/trl_sft/adapter_fastlora")
