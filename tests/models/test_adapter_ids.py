"""Batches whose rows use different adapters of a stack give the results of the rows one by one."""

import pytest
import torch
from torch.utils._pytree import tree_map

from fastlora import functional as FL
from oracles.pairs import adapted
from oracles.trees import randomised, relative_error, token_ids

IDS = token_ids(3, 9)
WHICH = torch.tensor([2, 0, 2])


def stack_of(model, n=3):
    adapters = [randomised(model.adapter, seed) for seed in range(n)]
    return adapters, tree_map(lambda *leaves: torch.stack(leaves), *adapters)


TARGETS = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
DROPOUTS = {
    "lora": ("llama2", {}),
    "dora": ("llama2", {"use_dora": True}),
    "lora_bias": ("llama2", {"lora_bias": True}),
    "embedding and head": ("llama2", {"target_modules": TARGETS}),
    "beside experts": ("qwen3_moe_mixed", {"target_modules": ["q_proj", "o_proj"]}),
    "an initial offset": ("llama2", {"init_lora_weights": "pissa"}),
}


def alone(model, adapters, i, **inputs):
    row = {name: x[i : i + 1] for name, x in inputs.items()}
    return FL.forward(adapters[WHICH[i]], model.base, model.spec, IDS[i : i + 1], **row)[0]


@pytest.mark.parametrize("case", ["plain", "left-padded", "packed"])
def test_each_row_uses_the_adapter_that_adapter_ids_names(tiny, case):
    adapters, stack = stack_of(tiny)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    segments = (torch.arange(9) // 4).expand_as(IDS)
    given = {"left-padded": {"attention_mask": mask}, "packed": {"segment_ids": segments}}
    inputs = given.get(case, {})
    mixed = FL.forward(stack, tiny.base, tiny.spec, IDS, adapter_ids=WHICH, **inputs)
    for i in range(3):
        expected = alone(tiny, adapters, i, **inputs)
        torch.testing.assert_close(mixed[i], expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(mixed[0], alone(tiny, adapters[::-1], 0, **inputs), atol=1e-3)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_rows_may_have_different_dora_or_biased_adapters(pair, settings):
    model = adapted(pair("llama2").model, r=2, **settings)
    adapters, stack = stack_of(model)
    mixed = FL.forward(stack, model.base, model.spec, IDS, adapter_ids=WHICH)
    rows = [alone(model, adapters, i) for i in range(3)]
    assert relative_error(mixed, torch.stack(rows)) < 1e-5


@pytest.mark.parametrize("seed", [7, torch.tensor(-(2**40))], ids=["int", "tensor"])
@pytest.mark.parametrize("case", DROPOUTS)
def test_dropout_masks_of_a_row_are_those_of_its_adapter_in_the_same_batch(case, seed, pair):
    family, settings = DROPOUTS[case]
    model = adapted(pair(family).model, r=2, lora_dropout=0.5, **settings)
    adapters, stack = stack_of(model)
    ids = IDS[:1].expand(3, -1)  # equal rows: only the masks of rows 0 and 2 differ
    run = lambda adapter, **more: FL.forward(
        adapter, model.base, model.spec, ids, seed=seed, **more
    )
    mixed = run(stack, adapter_ids=WHICH)
    for i, adapter in enumerate(WHICH.tolist()):
        assert relative_error(mixed[i], run(adapters[adapter])[i]) < 1e-4
    assert relative_error(mixed[0], mixed[2]) > 1e-3


@pytest.mark.compile
def test_a_users_own_compile_draws_the_same_masks_per_row(shallow, fresh_dynamo):
    _, stack = stack_of(shallow)
    run = lambda stack, ids: FL.forward(
        stack, shallow.base, shallow.spec, IDS, adapter_ids=ids, seed=3
    )
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(stack, WHICH), run(stack, WHICH)) < 1e-10


def test_gradients_reach_exactly_the_adapters_that_rows_use(tiny):
    adapters, stack = stack_of(tiny)
    loss = lambda s: FL.forward(s, tiny.base, tiny.spec, IDS, adapter_ids=WHICH).square().sum()
    grads = torch.func.grad(loss)(stack)
    wanted = torch.func.grad(lambda a: alone(tiny, [a, a, a], 1).square().sum())(adapters[0])
    assert relative_error(tree_map(lambda x: x[0], grads), wanted) < 1e-10
    assert not any(x[1].any() for x in torch.utils._pytree.tree_leaves(grads))
