"""A stack of adapters in one pass gives the values and gradients of each adapter alone."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora import research
from fastlora.formats.mlx import save_mlx_adapter
from fastlora.model import Model
from oracles.pairs import adapted
from oracles.trees import relative_error, token_ids

# Ranks, scalings, kinds of scalings and targets all differ.
SETTINGS = (
    dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj", "up_proj", "gate_proj"]),
    dict(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj", "o_proj"]),
    dict(r=3, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "k_proj", "v_proj"]),
)
ATTENTION = ["q_proj", "v_proj", "o_proj"]
IDS = token_ids(6, 9)
ROWS = {
    "equal blocks": None,
    "equal, mixed": torch.tensor([2, 0, 2, 1, 1, 0]),
    "unequal": torch.tensor([2, 0, 2, 2, 0, 2]),
}


def three(base: Model, **settings) -> list[Model]:
    base = base if base.adapter is None else fastlora.disable(base)
    return [adapted(base, seed=i, **(own | settings)) for i, own in enumerate(SETTINGS)]


def rows_of(which: Tensor | None, n: int = 3) -> Tensor:
    return torch.arange(len(IDS)) // (len(IDS) // n) if which is None else which


def batch_of(ids: Tensor, **more: Tensor) -> dict[str, Tensor]:
    labels = torch.where(ids % 5 == 0, -100, ids)
    return {"input_ids": ids, "labels": labels, **more}


def together(models, batch, which=None, **how):
    """(values of each row, gradients of each model)."""
    stack, spec = FL.stack(models)
    spec = spec if "spec" not in how else how.pop("spec")(spec)
    values = []

    def total(stack):
        sums, _ = FL.row_losses(stack, models[0].base, spec, batch, adapter_ids=which, **how)
        values.append(sums.detach())
        return sums.sum()

    _, grads = fastlora.value_and_grad(total)(stack)
    return values[0], FL.unstack(grads, models)


def alone(models, batch, which=None, seeds=None):
    """The same, from each model with its own rows."""
    owner, grads = rows_of(which, len(models)), []
    values = torch.zeros(len(owner), dtype=models[0].base["norm"].dtype)
    for i, model in enumerate(models):
        mine = {k: x[owner == i] for k, x in batch.items()}
        seed = None if seeds is None else int(seeds[i])
        if not len(mine["input_ids"]):
            grads.append(tree_map(torch.zeros_like, model.adapter))
            continue

        def total(adapter, model=model, mine=mine, seed=seed, i=i):
            sums, _ = FL.row_losses(adapter, model.base, model.spec, mine, seed=seed)
            values[owner == i] = sums.detach()
            return sums.sum()

        grads.append(fastlora.value_and_grad(total)(model.adapter)[1])
    return values, grads


def assert_equal(mine, theirs, tolerance):
    assert relative_error(mine[0], theirs[0]) < tolerance
    for i, (a, b) in enumerate(zip(mine[1], theirs[1], strict=True)):
        if any(x.any() for x in tree_leaves(b)):
            assert relative_error(a, b) < tolerance, i
        else:
            assert not any(x.any() for x in tree_leaves(a)), i


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stack_equals_its_adapters_alone(case, dropout, tiny):
    """In float64. With a seed for each adapter, its rows have the masks of its single run."""
    models, which = three(tiny, lora_dropout=dropout), ROWS[case]
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    batch, seeds = batch_of(IDS, attention_mask=mask), torch.tensor([3, 2**40, 3])
    assert_equal(
        together(models, batch, which, seed=seeds), alone(models, batch, which, seeds), 1e-9
    )
    if dropout:
        other = together(models, batch, which, seed=seeds + 1)[0]
        assert relative_error(other, alone(models, batch, which, seeds)[0]) > 1e-4


@pytest.mark.parametrize("case", ROWS)
def test_every_row_has_the_noise_of_its_single_run(case, tiny):
    """NEFTune's, in float64, with a seed for each adapter."""
    models = [replace(m, spec=replace(m.spec, neftune_alpha=5.0)) for m in three(tiny)]
    batch, seeds, which = batch_of(IDS), torch.tensor([3, 2**40, 3]), ROWS[case]
    mine = together(models, batch, which, seed=seeds)
    assert_equal(mine, alone(models, batch, which, seeds), 1e-9)
    assert relative_error(mine[0], together(models, batch, which)[0]) > 1e-4


@pytest.mark.parametrize("policy", ["none", "full", "offload", 0.4])
def test_every_recompute_policy_gives_the_same(policy, tiny):
    models, batch = three(tiny, lora_dropout=0.2), batch_of(IDS)
    models = [model.with_spec(recompute=policy) for model in models]
    seeds, which = torch.tensor([1, 2, 3]), ROWS["unequal"]
    assert_equal(
        together(models, batch, which, seed=seeds), alone(models, batch, which, seeds), 1e-9
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe_mixed", "smollm3", "gemma3", "phi3"])
def test_every_kind_of_layer_runs_a_stack(family, pair):
    """Biases, norms of q and k, experts and router, layers without RoPE, fused projections."""
    attention = ["qkv_proj", "o_proj"] if family == "phi3" else ATTENTION
    how: dict = {"lora_dropout": 0.2}
    if "moe" in family:
        how = {"target_parameters": ["gate.weight", "gate_up_proj", "down_proj"]}
    models = three(pair(family).model, target_modules=attention, **how)
    batch = batch_of(IDS, segment_ids=(torch.arange(9) // 4).expand_as(IDS))
    seeds = torch.tensor([1, 2, 3])
    for which in (None, ROWS["unequal"]):
        assert_equal(
            together(models, batch, which, seed=seeds), alone(models, batch, which, seeds), 2e-5
        )


def test_a_quantised_base_runs_a_stack_and_is_dequantised_once(quantised_folder):
    base, _ = fastlora.load(quantised_folder("nf4"), device="cpu")
    models, batch = three(base), batch_of(IDS)
    calls: Counter = Counter()

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[str(func)] += "stacked_linear" in str(func)
            return func(*args, **kwargs or {})

    for which in ROWS.values():
        assert_equal(together(models, batch, which), alone(models, batch, which), 2e-5)
    stack, spec = FL.stack(models)
    with Count(), torch.no_grad():
        FL.loss(stack, base.base, spec, batch)
    assert sum(calls.values()) == 7 * base.spec.config.num_hidden_layers


def test_documents_of_one_row_may_use_different_adapters(tiny):
    """adapter_ids [b, t]: each packed document has the values that it has alone."""
    models = three(tiny)
    stack, spec = FL.stack(models)
    ids, lengths = IDS[:2], [4, 2, 3]
    segments = torch.arange(3).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    owner = torch.stack([torch.tensor([2, 0, 2])[segments[0]], segments[1]])
    logits = FL.forward(stack, tiny.base, spec, ids, segment_ids=segments, adapter_ids=owner).split(
        lengths, dim=1
    )
    for row in range(2):
        for piece, document in zip(logits, ids.split(lengths, dim=1), strict=True):
            at = sum(x.shape[1] for x in logits[: [*map(id, logits)].index(id(piece))])
            model = models[int(owner[row, at])]
            expected = FL.forward(model.adapter, model.base, model.spec, document[row : row + 1])
            assert relative_error(piece[row], expected[0]) < 1e-10
    batch = batch_of(ids, segment_ids=segments)
    loss = lambda s: FL.loss(s, tiny.base, spec, batch, adapter_ids=owner)
    _, grads = fastlora.value_and_grad(loss)(stack)
    assert relative_error(grads, torch.func.grad(loss)(stack)) < 1e-9


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_padding_stays_zero_under_adamw(weight_decay, tiny):
    models = three(tiny)
    stack, spec = FL.stack(models)
    gradient = fastlora.value_and_grad(
        lambda s: FL.loss(s, tiny.base, spec, batch_of(IDS), adapter_ids=ROWS["unequal"] % 3)
    )
    params = tree_leaves(stack)
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=weight_decay)
    before = tree_map(torch.clone, stack)
    for _ in range(3):
        for x, g in zip(params, tree_leaves(gradient(stack)[1]), strict=True):
            x.grad = g
        optimizer.step()
    restored, _ = FL.stack(
        [m.with_adapter(a) for m, a in zip(models, FL.unstack(stack, models), strict=True)]
    )
    assert relative_error(stack, before) > 0.1
    assert all(
        torch.equal(x, y) for x, y in zip(tree_leaves(stack), tree_leaves(restored), strict=True)
    )


def test_unstack_returns_the_adapters(tiny):
    models = three(tiny)
    stack, spec = FL.stack(models)
    assert stack["layers"][0]["q_proj"].a.shape == (3, 4, 16)
    assert all(x.shape[0] == 3 for x in tree_leaves(stack))
    for model, adapter in zip(models, FL.unstack(stack, models), strict=True):
        assert relative_error(adapter, model.adapter) == 0
        model.with_adapter(adapter)
    with pytest.raises(ValueError, match="2 models for a stack of 3"):
        FL.unstack(stack, models[:2])
    hash(spec)


def test_unstack_refuses_other_models_than_were_stacked(tiny):
    base = fastlora.disable(tiny)
    first, second = adapted(base, r=4), adapted(base, seed=1, r=2)
    other = adapted(base, r=2, target_modules=["q_proj"])
    stack, _ = FL.stack([first, second])
    wrong = {
        "has rank 2, and its adapter in the stack has a larger rank": [second, first],
        "has rank 8, and the stack 4": [first, adapted(base, r=8)],
        "has no adapter, and its adapter": [first, other],
        "model 1 has no adapter$": [first, base],
    }
    for reason, models in wrong.items():
        with pytest.raises(ValueError, match=reason):
            FL.unstack(stack, models)
    with pytest.raises(ValueError, match="and the stack has none"):
        FL.unstack(FL.stack([other])[0], [second])
    with pytest.raises(ValueError, match="dict that is no stack") as error:
        FL.unstack(first.adapter, [first])
    assert "tensor(" not in str(error.value)


def test_models_that_cannot_be_stacked_are_refused_by_name(tiny, pair):
    base = fastlora.disable(tiny)
    lora = lambda **settings: fastlora.lora(base, r=2, **settings)
    refused = {
        "DoRA": lora(use_dora=True),
        "lora_bias": lora(lora_bias=True),
        "embedding or the head": lora(target_modules=["embed_tokens"]),
        "modules_to_save": lora(modules_to_save=["lm_head"]),
        "rows of tokens": lora(trainable_token_indices=[1]),
        "initial offset": lora(init_lora_weights="pissa"),
        "no adapter": base,
    }
    with pytest.raises(ValueError) as error:
        FL.stack([lora(), *refused.values()])
    assert all(name in str(error.value) for name in refused)
    different = [
        lora(lora_dropout=0.5),
        lora(recompute="full"),
        fastlora.lora(pair("llama2").model, r=2),
    ]
    with pytest.raises(ValueError, match=r"(?s)lora_dropout 0.5.*another way.*other base"):
        FL.stack([lora(), *different])
    with pytest.raises(ValueError, match="a list of one model or more"):
        FL.stack([])


def test_functions_of_one_adapter_refuse_a_stack_before_any_work(tmp_path):
    model, tokenizer = fastlora.load("demo", max_seq_length=64, device="cpu")
    models = [adapted(model, seed=i, r=2) for i in range(2)]
    adapter, spec = FL.stack(models)
    stacked, rows = replace(models[0], adapter=adapter, spec=spec), [{"text": "def f(): pass"}] * 4
    batches, out = [{"input_ids": IDS}], tmp_path / "out"
    for verb in (
        lambda: fastlora.train(stacked, tokenizer, rows, output_dir=out),
        lambda: fastlora.train([models[0], stacked], tokenizer, rows, output_dir=out),
        lambda: fastlora.find_learning_rate(stacked, tokenizer, rows),
        lambda: fastlora.plan(stacked, batch_size=2, seq_length=64, memory="80GB"),
        lambda: fastlora.combine([models[0], stacked], [0.5, 0.5]),
        lambda: fastlora.merge(stacked),
        lambda: fastlora.initialize(stacked, batches, "eva"),
        lambda: research.training_points(stacked, tmp_path),
        lambda: stacked.save_pretrained(out),
        lambda: stacked.save_pretrained_merged(out),
        lambda: stacked.save_pretrained_merged(out, save_method="lora"),
        lambda: stacked.push_to_hub("user/name"),
        lambda: stacked.save_gguf(tmp_path / "m.gguf", tokenizer, pre="gpt-2"),
        lambda: stacked.save_gguf_adapter(tmp_path / "a.gguf"),
        lambda: stacked.save_ollama(out, tokenizer, pre="gpt-2"),
        lambda: save_mlx_adapter(stacked, out),
    ):
        with pytest.raises(ValueError, match="stack of 2 adapters, where one is needed"):
            verb()
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_fit_a_stack_are_refused(tiny):
    stack, spec = FL.stack(three(tiny))

    def run(stack=stack, spec=spec, ids=IDS, **how):
        return FL.forward(stack, tiny.base, spec, ids, **how)

    with pytest.raises(ValueError, match="5 rows cannot be shared equally"):
        run(ids=IDS[:5])
    with pytest.raises(ValueError, match=r"in \[0, 3\), got"):
        run(adapter_ids=torch.tensor([0, 1, 2, 3, 0, 0]))
    with pytest.raises(ValueError, match="is not a stack"):
        run(tiny.adapter, tiny.spec, adapter_ids=rows_of(None))
    with pytest.raises(ValueError, match="one of 3"):
        run(seed=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="pass one seed"):
        run(seed=torch.tensor([1, 2, 3]), adapter_ids=torch.zeros_like(IDS))
    dora = adapted(fastlora.disable(tiny), use_dora=True)
    of_dora = tree_map(lambda x: x[None], dora.adapter), dora.spec
    with pytest.raises(ValueError, match="number for each row"):
        run(*of_dora, adapter_ids=torch.zeros_like(IDS))


def test_under_a_transform_a_stack_gives_the_same(tiny):
    models = three(tiny, lora_dropout=0.3)
    stack, spec = FL.stack(models)
    seeds, batch, which = torch.tensor([3, 4, 3]), batch_of(IDS), ROWS["equal, mixed"]
    run = lambda s: FL.row_losses(s, tiny.base, spec, batch, adapter_ids=which, seed=seeds)[0].sum()
    value, grads = fastlora.value_and_grad(run)(stack)
    theirs, reference = torch.func.grad_and_value(run)(stack)[::-1]
    assert relative_error([value, grads], [theirs, reference]) < 1e-9


def test_a_stack_generates_with_each_adapters_scaling(tiny):
    models = three(tiny)
    stack, spec = FL.stack(models)
    together = replace(models[0], adapter=stack, spec=spec)
    which = [2, 0, 2, 1, 1, 0]
    ids, logp = together.generate(IDS, max_new_tokens=4, adapter_ids=which, return_logprobs=True)
    for row, owner in enumerate(which):
        model, mine = models[owner], IDS[row : row + 1]
        own, theirs = model.generate(mine, max_new_tokens=4, return_logprobs=True)
        # A row that stops is filled up to the longest.
        assert torch.equal(ids[row, : own.shape[1]], own[0])
        torch.testing.assert_close(logp[row, : theirs.shape[1]], theirs[0], rtol=1e-5, atol=1e-6)


def steps_of_adamw(tree, gradient, rates, n=5):
    """Take n steps in place; views of the tree's slices are one group of parameters for each run.

    Without `rates` of several runs, the tree is one adapter.
    """
    leaves = tree_leaves(tree)
    views = [[x[i] for x in leaves] for i in range(len(rates))] if len(rates) > 1 else [leaves]
    groups = [dict(params=p, lr=rate) for p, rate in zip(views, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for k in range(n):
        grads = tree_leaves(gradient(tree, k))
        for i, group in enumerate(views):
            for view, grad in zip(group, grads, strict=True):
                view.grad = grad[i] if len(rates) > 1 else grad
        optimizer.step()
    return tree


def test_five_steps_of_adamw_equal_the_single_runs(tiny):
    """One optimizer over the stack, with a group of views for each run."""
    models = three(tiny, lora_dropout=0.2)
    stack, spec = FL.stack(models)
    rates, which = (1e-2, 3e-2, 1e-3), ROWS["equal, mixed"]
    seeds_of = lambda k: torch.tensor([k, 9 * k, k])

    def losses(s, seeds):
        batch, how = batch_of(IDS), dict(adapter_ids=which, seed=seeds)
        total, tokens = FL.row_losses(s, tiny.base, spec, batch, **how)
        mine = torch.nn.functional.one_hot(which).to(total.dtype)
        return ((total @ mine) / (tokens.to(total.dtype) @ mine)).sum()

    steps_of_adamw(stack, lambda s, k: fastlora.value_and_grad(losses)(s, seeds_of(k))[1], rates)
    for i, (model, mine) in enumerate(zip(models, FL.unstack(stack, models), strict=True)):
        args = model.base, model.spec, batch_of(IDS[which == i])
        gradient = lambda a, k, args=args, i=i: fastlora.value_and_grad(FL.loss)(
            a, *args, seed=int(seeds_of(k)[i])
        )[1]
        single = steps_of_adamw(tree_map(torch.clone, model.adapter), gradient, rates[i : i + 1])
        assert relative_error(mine, single) < 1e-9
        assert relative_error(mine, model.adapter) > 1e-3
