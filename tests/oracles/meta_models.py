"""Models on the meta device: shapes and names without memory."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastlora.model import Model
from fastlora.models.config_json import config_from_json
from fastlora.models.names import base_from_tensors
from fastlora.models.spec import Spec
from oracles.checkpoints import FAMILIES


def on_meta_device(family, **changed):
    """transformers' model of a family on the meta device, and fastlora's over the same tensors."""
    kwargs = FAMILIES[family] | changed
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**kwargs))
    config = config_from_json(hf.config.to_dict())
    base = base_from_tensors(config, dict(hf.state_dict()))
    return hf, Model(spec=Spec(config=config, name_or_path="x", max_seq_length=64), base=base)
