# %% [markdown]
# # TRL's SFTTrainer over PEFT
#
# `trl_sft_fastlora.py` is the same run with fastlora. The losses of all 20 steps are equal to 1e-4:
# rows, their order, the first adapter and all settings are the same, in float32.
#
# `pip install trl peft`

# %%
import json

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from fastlora.checkpoints.hub import DEMO as MODEL  # a small Llama; any other works as well

# %% [markdown]
# ## Rows
#
# The rows are put into the order in which fastlora takes them.

# %%
rows = [json.loads(line) for line in open(MODEL / "train.jsonl")][:80]
order = np.random.default_rng([3407, 0]).permutation(len(rows))
dataset = Dataset.from_list([rows[i] for i in order])

# %% [markdown]
# ## Model, adapter and trainer

# %%
tokenizer = AutoTokenizer.from_pretrained(MODEL)
peft_config = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
arguments = SFTConfig(
    output_dir="runs/trl_sft/out",
    max_steps=20,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    learning_rate=2e-3,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    weight_decay=0.01,
    optim="adamw_torch",
    max_length=512,
    assistant_only_loss=True,
    train_sampling_strategy="sequential",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    bf16=False,
    use_cpu=True,
)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
    args=arguments,
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=peft_config,
)
trainer.model.save_pretrained("runs/trl_sft/start")  # A is random: the twin starts from this one

# %% [markdown]
# ## Training

# %%
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
    output = trainer.model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
trainer.save_model("runs/trl_sft/adapter")
