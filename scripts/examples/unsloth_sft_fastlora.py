# %% [markdown]
# # The run of `unsloth_sft.py` with fastlora
#
# It runs on CPUs too. `load` and `lora` take the arguments of Unsloth's `from_pretrained` and
# `get_peft_model`.

# %%
import json
from pathlib import Path

import fastlora
from fastlora.checkpoints.hub import DEMO

MODEL, DTYPE = DEMO, "float32"  # "unsloth/Llama-3.2-1B-Instruct", "auto"
LOAD_IN_4BIT = False

# %% [markdown]
# ## Model and adapter

# %%
base, tokenizer = fastlora.load(MODEL, max_seq_length=512, dtype=DTYPE, load_in_4bit=LOAD_IN_4BIT)
model = fastlora.lora(
    base,
    r=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)
start = Path("runs/unsloth_sft/start")
if start.exists():  # the A of the other script, for equal losses
    model = fastlora.load_adapter(base, start)

# %% [markdown]
# ## Training
#
# `train_on="responses"` is the default. It finds the replies in the chat template, so the markers
# of `train_on_responses_only` are not needed.

# %%
rows = [json.loads(line) for line in open(DEMO / "train.jsonl")][:80]
model, history = fastlora.train(
    model,
    tokenizer,
    rows,
    packing=False,
    batch_size=4,
    gradient_accumulation_steps=1,
    warmup_ratio=0.1,
    max_steps=20,
    learning_rate=2e-3,
    weight_decay=0.01,
    lr_scheduler="linear",
    seed=3407,
)
losses = history.losses
print(*(f"{loss:.4f}" for loss in losses))

# %% [markdown]
# ## A reply, and the adapter

# %%
print(model.generate_text(tokenizer, rows[0]["messages"][:1], max_new_tokens=16))
model.save_pretrained("runs/unsloth_sft/adapter_fastlora")
