"""model_card(): README.md of a trained adapter, filled from its run, without blanks to fill in."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from fastlora.adapters.edits.merging import merge_problem
from fastlora.formats.gguf.adapter_file import adapter_problems
from fastlora.formats.gguf.metadata import architecture_problems
from fastlora.formats.peft.writing import is_hub_id, readme
from fastlora.models.params import EXPERTS
from fastlora.models.spec import LoraConfig
from fastlora.models.state import ModelState, require_adapter


def may_replace_card(text: str, model: ModelState) -> bool:
    """Whether fastlora wrote a README.md and nobody has edited it since."""
    lora, _ = require_adapter(model)
    marks = re.findall("<!-- written by fastlora.train, .*-->\n", text)
    is_ours = len(marks) == 1 and marks[0] == _mark(text.replace(marks[0], ""))
    return is_ours or text == readme(model.spec, lora)


def _mark(text: str) -> str:
    """A line with the digest of the rest of the card, which shows later whether that was edited."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"<!-- written by fastlora.train, SHA-256 of the other lines {digest} -->\n"


def model_card(model: ModelState, record: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        model: the trained one.
        record: the content of run.json.
    """
    lora, _ = require_adapter(model)
    name = model.spec.name_or_path
    # A path of this machine means nothing to the readers of the card.
    base = name if name == "demo" or is_hub_id(name) else "the-folder-of-the-base"
    head = readme(model.spec, lora) + "\n"
    parts = [
        "## Training\n",
        "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in _facts(record).items())]),
        "\nAll settings and versions are in `run.json`, every step in `training_run.json`.\n",
        "## Loading\n",
        f"```python\n{_python(base, record['model']['quantized_to'])}\n```\n",
    ]
    if commands := _shell(base, model):
        parts.append(f"```sh\n{commands}\n```\n")
    if problems := vllm_problems(lora):
        text = f"vLLM does not load this adapter: it has {', '.join(problems)}."
        if not merge_problem(model.spec):
            text += (
                " Merge it into the base with `model.save_pretrained_merged(folder, tokenizer)` and"
                " serve that folder."
            )
        parts.append(f"{text}\n")
    if base != name:
        parts.append("The base was loaded from a local folder, which is not part of this one.\n")
    parts.append("The licence of the base applies to what is computed with it.\n")
    rest = "\n".join(parts)
    return head + _mark(head + rest) + rest


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """Row title -> text, of what is known."""
    settings, result = record["settings"], record["result"]
    facts = {"data": _data(record["data"])}
    if record["eval_data"] is not None:
        facts["held-out data"] = _data(record["eval_data"])
    facts["steps"] = (
        f"{result['steps']:,}, of {settings['batch_size']} x"
        f" {settings['gradient_accumulation_steps']} sequences of at most"
        f" {record['model']['max_seq_length']:,} tokens"
    )
    facts["loss"] = f"{result['first_loss']:.4f} at the first step, {result['last_loss']:.4f} last"
    if "best_step" in result:
        facts["held-out loss"] = (
            f"{result['last_eval_loss']:.4f} at the end, lowest {result['best_eval_loss']:.4f}"
            f" after step {result['best_step']:,}"
        )
        if settings["keep_best"]:
            facts["weights"] = f"those after step {result['best_step']:,} (keep_best=True)"
    names = ("learning_rate", "learning_rates", "lr_scheduler", "warmup_ratio", "weight_decay")
    names += ("max_grad_norm", "optimizer", "neftune_alpha", "clip_per_example")
    names += ("noise_multiplier", "packing", "train_on", "seed")
    given = [f"{n}={settings[n]!r}" for n in names if settings.get(n) is not None]
    facts["settings"] = f"`{', '.join(given)}`"
    facts["base dtype"] = record["model"]["dtype"]
    if precision := record["model"]["quantized_to"]:
        facts["base quantized to"] = precision
    facts["device"] = str(record["device"]["name"])
    facts["time"] = f"{result['seconds']:.0f} s in steps; ended {result['ended']}"
    facts["versions"] = ", ".join(f"{name} {v}" for name, v in record["versions"].items())
    return facts


def _data(data: Mapping[str, Any]) -> str:
    name = data["name"].replace("|", "\\|").replace("\n", " ")
    return (
        f"{name}: {data['sequences']:,} sequences of {data['tokens']:,} tokens,"
        f" fingerprint `{data['fingerprint']}`"
    )


# Format of the quantised base -> the argument of `load` that quantises to it. A base in int8 was
# quantised in the checkpoint already.
_PRECISIONS = {"4 bits": ", load_in_4bit=True", "fp8": ', base_precision="fp8"'}


def _python(base: str, quantized_to: str | None) -> str:
    how = _PRECISIONS.get(quantized_to or "", "")
    peft = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "this-folder")',
    ]
    if quantized_to == "4 bits":
        peft[1] += ", BitsAndBytesConfig"
        nf4 = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'
        peft[2] = peft[2].removesuffix(")") + ", quantization_config=nf4)"
        peft.insert(2, f"nf4 = BitsAndBytesConfig({nf4})")
    load = f'model, tokenizer = fastlora.load("this-folder"{how})  # the base, then the adapter'
    return "\n".join(["import fastlora", load, "", *peft])


def _shell(base: str, model: ModelState) -> str:
    """Commands for llama.cpp and for vLLM, if they compute what this model does."""
    lora, _ = require_adapter(model)
    lines = []
    if not (architecture_problems(model.spec.config) or adapter_problems(model)):
        convert = f"python convert_lora_to_gguf.py --base {base} this-folder"
        if not _converts(lora):
            convert = "python scripts/export.py this-folder adapter.gguf --format gguf-adapter"
        lines.append(f"{convert}  # llama.cpp")
    if not vllm_problems(lora):
        rank = max([lora.r, *(t.r for layer in lora.targets for t in layer)])
        # vLLM refuses a rank above --max-lora-rank, whose default is 16.
        lines.append(
            f"vllm serve {base} --enable-lora --max-lora-rank {_vllm_rank(rank)}"
            " --lora-modules adapter=this-folder"
        )
    return "\n".join(lines)


def _converts(lora: LoraConfig) -> bool:
    """Whether llama.cpp's script converts the adapter. It writes one alpha, by which llama.cpp
    scales with alpha / r, and does not know PEFT's names of the experts' tensors. fastlora's
    scripts/export.py writes both."""
    targets = [target for layer in lora.targets for target in layer]
    scaled = [x for x in (*targets, lora.extras.lm_head) if x is not None]
    standard = all(x.scaling == lora.lora_alpha / x.r for x in scaled)
    return standard and not any(target.name in EXPERTS for target in targets)


def _vllm_rank(rank: int) -> int:
    """The smallest value of --max-lora-rank that allows a rank."""
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def vllm_problems(lora: LoraConfig) -> list[str]:
    """The parts of an adapter with which vLLM refuses to load it (vllm/lora/peft_helper.py)."""
    rank = max([lora.r, *(t.r for layer in lora.targets for t in layer)])
    parts = {
        "modules_to_save": bool(lora.modules_to_save),
        "trained tokens": bool(lora.extras.tokens),
        "DoRA": lora.use_dora,
        "biases": lora.bias != "none" or lora.lora_bias,
        "a rank above 512": rank > 512,
    }
    return [name for name, present in parts.items() if present]
