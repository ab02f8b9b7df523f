"""Where features meet: what excludes what, said before any work, and what goes together."""

import pytest
import torch

import fastlora
from oracles.pairs import adapted
from oracles.trees import token_ids

IDS = token_ids(2, 7, vocab_size=96)
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_experts_have_no_start_factors(pair, init):
    model = pair("qwen3_moe").model
    with pytest.raises(ValueError, match=r"does not support model\.layers\.0\.mlp\.experts"):
        fastlora.lora(model, r=2, target_parameters=BOTH, init_lora_weights=init)


@pytest.mark.parametrize("method", ["eva", "corda", "lora_ga"])
def test_data_does_not_initialise_mixtures(pair, method):
    model = fastlora.lora(pair("qwen3_moe").model, r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="mixture of experts"):
        fastlora.initialize(model, [{"input_ids": IDS, "labels": IDS}], method)


def test_quantisation_excludes_mixtures_and_moved_bases(pair):
    for family in ("qwen3_moe", "llama2"):
        with pytest.raises(ValueError, match="qat_scheme"):
            fastlora.lora(
                pair(family).model,
                r=2,
                qat_scheme="int8",
                target_modules=["q_proj"],
                init_lora_weights="pissa" if family == "llama2" else True,
            )


def test_pissa_on_a_mixtures_attention_starts_equal_and_generates(pair):
    base = pair("mixtral").model
    model = fastlora.lora(base, r=2, target_modules=["q_proj", "o_proj"], init_lora_weights="pissa")
    torch.testing.assert_close(model(IDS), base(IDS), rtol=0, atol=1e-5)
    ids = model.generate(IDS, max_new_tokens=3, eos_token_id=())
    assert ids.equal(base.generate(IDS, max_new_tokens=3, eos_token_id=()))


def test_a_mixed_batch_runs_start_factors_and_experts(pair):
    first = fastlora.lora(pair("llama2").model, r=2, init_lora_weights="pissa")
    second = adapted(pair("qwen3_moe").model, r=2, target_parameters=BOTH)
    for model in (first, second):
        stack = torch.utils._pytree.tree_map(lambda x: torch.stack([x, 2 * x]), model.adapter)
        which = torch.tensor([1, 0])
        mixed = fastlora.functional.forward(stack, model.base, model.spec, IDS, adapter_ids=which)
        torch.testing.assert_close(mixed[1:], model(IDS[1:]), rtol=0, atol=1e-5)
        assert not torch.allclose(mixed[:1], model(IDS[:1]), atol=1e-3)
