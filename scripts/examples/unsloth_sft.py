# %% [markdown]
# # Unsloth and TRL's SFTTrainer
#
# The cells of Unsloth's notebook for conversations with Llama 3.2, with fewer steps.
# `unsloth_sft_fastlora.py` is the same run with fastlora. The losses of all 20 steps are equal to
# 1e-4: rows, their order, the first adapter and all settings are the same, in float32.
#
# `pip install unsloth`

# %%
# isort: off
from unsloth import FastLanguageModel  # before trl and transformers, which it patches
from unsloth.chat_templates import train_on_responses_only

# isort: on
import json

import numpy as np
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fastlora.checkpoints.hub import DEMO

MODEL, DTYPE = DEMO, "float32"  # "unsloth/Llama-3.2-1B-Instruct", None
LOAD_IN_4BIT = False
USER, ASSISTANT = "<|user|>", "<|assistant|>"
# Of Llama 3: "<|start_header_id|>user<|end_header_id|>\n\n", and the same with "assistant".

# %% [markdown]
# ## Model and adapter

# %%
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=str(MODEL), max_seq_length=512, dtype=DTYPE, load_in_4bit=LOAD_IN_4BIT
)
model = FastLanguageModel.get_peft_model(
    model,
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
model.save_pretrained("runs/unsloth_sft/start")  # A is random: the twin starts from this one

# %% [markdown]
# ## Rows
#
# The rows are put into the order in which fastlora takes them. The
# trainer adds a BOS token to every text. Without `removeprefix` each row would begin with two on
# the CPU, where Unsloth leaves SFTTrainer unchanged.

# %%
rows = [json.loads(line) for line in open(DEMO / "train.jsonl")][:80]
order = np.random.default_rng([3407, 0]).permutation(len(rows))
texts = [tokenizer.apply_chat_template(rows[i]["messages"], tokenize=False) for i in order]
texts = [text.removeprefix(tokenizer.bos_token) for text in texts]
dataset = Dataset.from_dict({"text": texts})

# %% [markdown]
# ## Training

# %%
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(
        output_dir="runs/unsloth_sft/out",
        dataset_text_field="text",
        max_length=512,
        packing=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        warmup_steps=2,
        max_steps=20,
        learning_rate=2e-3,
        logging_steps=1,
        optim="adamw_torch",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        train_sampling_strategy="sequential",
        seed=3407,
        save_strategy="no",
        report_to="none",
        bf16=False,
        fp16=False,
    ),
)
trainer = train_on_responses_only(trainer, instruction_part=USER, response_part=ASSISTANT)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(*(f"{loss:.4f}" for loss in losses))

# %% [markdown]
# ## A reply, and the adapter

# %%
FastLanguageModel.for_inference(model)
inputs = tokenizer.apply_chat_template(
    rows[0]["messages"][:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
model.save_pretrained("runs/unsloth_sft/adapter")
