"""initialize(method="corda"). Oracle: PEFT on the same batches.

PEFT decomposes with torch.svd_lowrank, which can be wrong by per cents on the flat spectra of
random models. These tests give it torch.linalg.svd instead, or a rank at which the randomised
decomposition is exact.
"""

import dataclasses
import sys
import types

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.config import CordaConfig
from torch.utils._pytree import tree_map

from fastlora.adapters.init_from_data.dispatch import initialize
from fastlora.formats.peft.names import peft_state_dict
from oracles.init_from_data import fresh, ids, padded, peft_config
from oracles.peft_cases import FORWARD
from oracles.peft_side import difference, fast, hf_logits, hugging_face, logits
from oracles.trees import same_bits


def peft_corda(data, method, monkeypatch, **settings):
    # PEFT imports its dataclass from attrs, which it does not depend on.
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    model = hugging_face(FORWARD)
    config = peft_config("corda", corda_config=CordaConfig(corda_method=method), **settings)

    def run():
        with torch.no_grad():
            for batch in data:
                model(input_ids=batch["input_ids"])

    preprocess_corda(model, config, run_model=run)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 6}}])
def test_corda_is_that_of_peft(method, settings, monkeypatch):
    data = [{"input_ids": ids(1, 20, seed=s)} for s in range(3)]  # PEFT takes one row at a time
    oracle = peft_corda(data, method, monkeypatch, **settings)
    model = initialize(fresh(**settings), data, "corda", corda_method=method)
    theirs, ours = (
        get_peft_model_state_dict(oracle),
        peft_state_dict(model.adapter, model.spec.lora),
    )
    assert ours.keys() == theirs.keys()
    for key, a in ours.items():
        if "lora_A" in key:
            b = key.replace("lora_A", "lora_B")
            expected = theirs[b] @ theirs[key]
            off = (ours[b] @ a - expected).abs().max() / expected.abs().max()
            # A contains an inverse, which multiplies rounding errors of float32 (1e-7) by the
            # condition of the covariance, about 100 here.
            assert off <= 1e-4, key
    # The moved base too: logits after a change that is the same on both sides.
    changed = model.with_adapter(tree_map(lambda x: 1.1 * x, model.adapter))
    for name, p in oracle.named_parameters():
        if "lora_" in name:
            p.data *= 1.1
    assert difference(logits(changed), hf_logits(oracle), logits(fast(FORWARD))) <= 1e-5


def test_corda_does_not_count_padding():
    data = padded(1)
    real = data[0]["attention_mask"].bool()
    one = initialize(fresh(), data, "corda")
    changed = dict(data[0], input_ids=torch.where(real, data[0]["input_ids"], 5))
    assert same_bits(one.adapter, initialize(fresh(), [changed], "corda").adapter)
