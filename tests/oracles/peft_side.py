"""PEFT's side of a comparison: its models, its folders, its logits, and its step of training.

Each measure asserts that the adapter moves the logits by at least 1000 tolerances, so that a
scaling that is 1 % off cannot pass. oracles/peft_table.py prints all of them.
"""

import copy
import functools
import json
import re
import tempfile
import warnings
from pathlib import Path

import peft
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map

from fastlora import functional
from fastlora.adapters.create import lora
from fastlora.adapters.init.methods import moves_base
from fastlora.formats.peft.names import peft_state_dict
from fastlora.formats.peft.reading import load_adapter
from fastlora.formats.peft.writing import save_adapter
from fastlora.model import Model
from fastlora.models.config_json import config_from_json
from fastlora.models.names import base_from_tensors
from fastlora.models.spec import Spec
from fastlora.runtime.gradients import value_and_grad
from oracles.checkpoints import make_checkpoint

IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(7))


@functools.cache
def session_folder():
    """Not tmp_path_factory: oracles/peft_table.py calls the measures without pytest."""
    return tempfile.TemporaryDirectory(prefix="fastlora-")


@functools.cache
def checkpoint(family, dtype=torch.float32):
    """A folder of the family's, kept for the session, and transformers' reading of it."""
    folder = Path(session_folder().name) / f"{family}-{dtype}"
    return folder, make_checkpoint(family, folder, dtype)


def hugging_face(family, dtype=torch.float32):
    return copy.deepcopy(checkpoint(family, dtype)[1])


def fast(family, dtype=torch.float32):
    folder, hf = checkpoint(family, dtype)
    config = config_from_json(json.loads((folder / "config.json").read_text()))
    spec = Spec(config=config, name_or_path=str(folder), max_seq_length=128, compile=False)
    return Model(spec=spec, base=base_from_tensors(config, dict(hf.state_dict())))


def with_random_adapter(model, seed=1, std=0.15):
    """The model with normal A and B."""
    gen = torch.Generator().manual_seed(seed)
    noise = lambda t: std * torch.randn(t.shape, generator=gen).to(t.dtype)
    return model.with_adapter(tree_map(noise, model.adapter))


def peft_config(**settings):
    """PEFT's config, of copies: ensure_weight_tying changes the given lists."""
    return PeftConfig(**copy.deepcopy(settings), task_type="CAUSAL_LM")


def peft_saved(family, folder, dtype=torch.float32, **settings):
    """A folder that PEFT wrote for a random adapter."""
    model = get_peft_model(hugging_face(family, dtype), peft_config(**settings))
    gen = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:  # in place: tied ones share memory
            p.data.copy_(0.15 * torch.randn(p.shape, generator=gen))
    model.save_pretrained(folder)


def peft_read(family, folder, dtype=torch.float32, **kwargs):
    """PEFT's reading of a folder over the untouched base, every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # These are torch's deprecations.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        # PEFT warns of every lora_bias over a base without biases, after its own save too.
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed but the targeted layer")
        # PEFT warns of every pattern for a parameter, after its own save too, and uses the pattern.
        warnings.filterwarnings(
            "ignore", r"The following \w+_pattern keys did not match any .*: \[[^,]*(gate|experts)"
        )
        # PEFT warns if a tied pair shares rows, because rows are not a "module".
        warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`, but no tied")
        # PEFT warns of tied bases of which a part is trained.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        # PEFT warns of folders whose config moves the base. fastlora writes no such folder.
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern")
        return PeftModel.from_pretrained(hugging_face(family, dtype), folder, **kwargs).eval()


@torch.no_grad()
def hf_logits(model):
    return model(input_ids=IDS).logits


@torch.no_grad()
def logits(model):
    return functional.forward(model.adapter, model.base, model.spec, IDS)


def difference(found, expected, base):
    """max|Δ| over max(1, absmax). Fails if the adapter changes the logits by less than 1e-2."""
    scale = max(1.0, expected.abs().max().item())
    effect = (expected - base).abs().max().item() / scale
    assert effect >= 1e-2, f"the adapter moves the logits by only {effect:.1e}"
    return (found.float() - expected.float()).abs().max().item() / scale


def import_difference(family, folder, **settings):
    """fastlora's logits with an adapter that PEFT saved, against PEFT's."""
    peft_saved(family, folder, **settings)
    model = load_adapter(fast(family), folder)
    base = hf_logits(checkpoint(family)[1])
    return difference(logits(model), hf_logits(peft_read(family, folder)), base)


def export_difference(family, folder, **settings):
    """PEFT's logits with an adapter that fastlora saved, against fastlora's."""
    model = with_random_adapter(lora(fast(family), **settings))
    model.save_pretrained(folder)
    base = logits(fast(family))
    return difference(hf_logits(peft_read(family, folder)), logits(model), base)


def peft_trainable(model, family, folder, settings):
    """PEFT's model with the same A and B. If the init moves the base, PEFT's base is moved too."""
    if not moves_base(model.spec.lora.init_lora_weights):
        save_adapter(model, folder)
        return peft_read(family, folder, is_trainable=True)
    config = PeftConfig(**settings | {"lora_dropout": 0.0}, task_type="CAUSAL_LM")
    trainable = get_peft_model(hugging_face(family), config)
    ours = peft_state_dict(model.adapter, model.spec.lora)
    peft.set_peft_model_state_dict(trainable, {k: v.clone() for k, v in ours.items()})
    return trainable.eval()


def step_difference(family, folder, **settings):
    """Tensors after one SGD step of rate 0.1 on both sides from the same exported adapter."""
    # Smaller than elsewhere: at 0.15 the gradients of the four-layer families reach 8, and fp32
    # itself errs by 1e-4 there, on both sides alike (against fp64, over 12 seeds).
    model = with_random_adapter(lora(fast(family), **settings | {"lora_dropout": 0.0}), std=0.06)
    batch = {"input_ids": IDS, "labels": IDS}
    _, grads = value_and_grad(functional.loss)(model.adapter, model.base, model.spec, batch)
    stepped = tree_map(lambda p, g: p - 0.1 * g, model.adapter, grads)

    trainable = peft_trainable(model, family, folder, settings)
    trainable(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for p in trainable.parameters():
            if p.requires_grad:
                p -= 0.1 * p.grad
    expected = get_peft_model_state_dict(trainable, save_embedding_layers=False)
    start, found = (
        peft_state_dict(model.adapter, model.spec.lora),
        peft_state_dict(stepped, model.spec.lora),
    )
    # With bias="all" PEFT writes two more copies of the module, which it does not read.
    expected = {k: v for k, v in expected.items() if not re.search(r"_module\.|_to_save\.", k)}
    assert found.keys() == expected.keys()
    step = max((v - start[k]).abs().max().item() for k, v in expected.items())
    assert step >= 1e-3, f"a step of {step:.1e} shows nothing"
    return max((found[k] - v).abs().max().item() for k, v in expected.items()) / max(1, step)


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
