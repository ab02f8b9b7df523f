# %% [markdown]
# # PEFT and transformers' Trainer
#
# `peft_trainer_fastlora.py` is the same run with fastlora. The losses of all 20 steps are equal to
# 1e-4: rows, their order, the first adapter and all settings are the same, in float32.
#
# `pip install transformers peft accelerate`

# %%
import json

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from fastlora.checkpoints.hub import DEMO as MODEL  # a small Llama; any other works as well

# %% [markdown]
# ## Model and adapter

# %%
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
config = LoraConfig(
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
torch.manual_seed(3407)
model = get_peft_model(model, config)
model.print_trainable_parameters()
model.save_pretrained("runs/peft_trainer/start")  # A is random: the twin starts from this one

# %% [markdown]
# ## Rows
#
# Only the replies are trained. The rows are put into the order in which fastlora takes them.

# %%
rows = [json.loads(line) for line in open(MODEL / "train.jsonl")][:80]


def encode(row: dict) -> dict:
    encoded = tokenizer.apply_chat_template(
        row["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    labels = [token if trained else -100 for token, trained in pairs]
    return {"input_ids": encoded["input_ids"], "labels": labels}


order = np.random.default_rng([3407, 0]).permutation(len(rows))
examples = [encode(rows[i]) for i in order]

# %% [markdown]
# ## Training

# %%
arguments = TrainingArguments(
    output_dir="runs/peft_trainer/out",
    max_steps=20,
    per_device_train_batch_size=4,
    learning_rate=2e-3,
    lr_scheduler_type="linear",
    warmup_steps=2,
    weight_decay=0.01,
    max_grad_norm=1.0,
    optim="adamw_torch",
    train_sampling_strategy="sequential",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=examples,
    data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(*(f"{loss:.4f}" for loss in losses))

# %% [markdown]
# ## A reply, and the adapter

# %%
inputs = tokenizer.apply_chat_template(
    rows[0]["messages"][:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
model.save_pretrained("runs/peft_trainer/adapter")
