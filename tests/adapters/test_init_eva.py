"""initialize(method="eva"). Oracle: PEFT on the same batches."""

import pytest
import torch
from peft import EvaConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import eva as peft_eva
from peft.utils.incremental_pca import IncrementalPCA
from torch.utils._pytree import tree_map

from fastlora.adapters.init_from_data.dispatch import initialize
from fastlora.adapters.init_from_data.eva import layer_components, update_components
from fastlora.formats.peft.names import peft_state_dict
from fastlora.models.names import projection_path
from oracles.init_from_data import batches, fresh, padded, peft_config
from oracles.peft_cases import FORWARD
from oracles.peft_side import difference, fast, hf_logits, hugging_face, logits, peft_read


def peft_after_every_batch(data, monkeypatch, **how):
    """PEFT's EVA with exact decompositions, after each batch once."""
    monkeypatch.setattr(IncrementalPCA, "_svd_fn_lowrank", IncrementalPCA._svd_fn_full)
    config = peft_config("eva", eva_config=EvaConfig(**how))
    config.eva_config.tau = -2.0  # one batch after the first is enough to converge
    model = get_peft_model(hugging_face(FORWARD), config)
    peft_eva.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    return model


@pytest.mark.filterwarnings("ignore:lora with eva")
@pytest.mark.parametrize(
    "how",
    [
        {"rho": 1.0},
        {"rho": 1.5},
        {},
        {"whiten": True},
        {"adjust_scaling_factors": False},
        {"use_label_mask": False},
    ],
)
@pytest.mark.parametrize("data", [batches(), padded()], ids=["whole", "padded"])
def test_eva_is_that_of_peft(data, how, monkeypatch):
    oracle = peft_after_every_batch(data, monkeypatch, **how)
    model = initialize(fresh(), data, "eva", tau=1.0, **how)
    theirs, ours = (
        get_peft_model_state_dict(oracle),
        peft_state_dict(model.adapter, model.spec.lora),
    )
    config = oracle.peft_config["default"]
    assert ours.keys() == theirs.keys()
    for key, found in ours.items():
        expected = theirs[key]
        # Equal shares of q, k and v are served in an order that PEFT leaves to its sort.
        assert abs(found.shape[0] - expected.shape[0]) <= ("lora_A" in key) * 1, key
        if "lora_B" in key:
            assert not found.any() and not expected.any()
        # PEFT whitens in place: the input of q, k and v three times, that of gate and up twice.
        elif "whiten" not in how or "o_proj" in key or "down_proj" in key:
            n = min(found.shape[0], expected.shape[0])
            torch.testing.assert_close(found[:n], expected[:n], rtol=0, atol=1e-3)
    assert sum(x.shape[0] for k, x in ours.items() if "lora_A" in k) == 14 * 4
    for i, targets in enumerate(model.spec.lora.targets):
        for t in targets:
            rank = config.rank_pattern.get(projection_path(i, t.name), 4)
            alpha = config.alpha_pattern.get(projection_path(i, t.name), 8)
            if t.r == rank:
                assert t.lora_alpha == pytest.approx(alpha)
            assert t.scaling == pytest.approx(t.lora_alpha / t.r)


def test_components_are_those_of_all_rows_at_once():
    gen = torch.Generator().manual_seed(0)
    spread = 3.0 * 0.5 ** torch.arange(12)  # a falling spectrum, so that little is cut off
    chunks = [torch.randn(n, 12, generator=gen) * spread + 2 for n in (30, 20, 25)]
    found = None
    for rows in chunks:
        found = update_components(found, rows, 12)
    whole = update_components(None, torch.cat(chunks), 12)
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)
    assert found.explained().sum() == pytest.approx(1.0, abs=1e-4)


def test_converged_components_are_not_updated():
    rows = [torch.randn(50, 8, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    stream = lambda n: iter([{"q_proj": x} for x in rows[:n]])
    two, four = (layer_components(stream(n), {"q_proj": 3}, -1.0, 0)["q_proj"] for n in (2, 4))
    assert torch.equal(two.vh, four.vh)
    assert not torch.equal(layer_components(stream(4), {"q_proj": 3}, 1.0, 0)["q_proj"].vh, two.vh)


def test_a_projection_left_without_a_rank_loses_its_adapter(tmp_path):
    data = batches(2, rows=8, tokens=30)
    model = initialize(fresh(r=1, lora_alpha=2), data, "eva", rho=9.0)
    named = [t.name for ts in model.spec.lora.targets for t in ts]
    assert len(named) < 14
    assert sum(t.r for ts in model.spec.lora.targets for t in ts) == 14
    trained = adapted_like(model)
    trained.save_pretrained(tmp_path)
    expected = hf_logits(peft_read(FORWARD, tmp_path))
    assert difference(logits(trained), expected, logits(fast(FORWARD))) <= 1e-5


def adapted_like(model):
    gen = torch.Generator().manual_seed(1)
    noise = lambda x: 0.15 * torch.randn(x.shape, generator=gen)
    return model.with_adapter(tree_map(noise, model.adapter))
