"""Initialisations that PEFT subtracts from the base: PiSSA, OLoRA, LoftQ. Oracle: PEFT.

PEFT moves the base to W - s B0 A0; here W stays and B0 A0 is subtracted on the way. What PEFT makes
of A and B over its moved base is the oracle for logits and for a step; PEFT's reading of the export
over the untouched base is the oracle for the folder.
"""

import dataclasses
import re
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from conftest import adapted, read_tiny, same_bits
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from test_export import (
    FORWARD,
    IDS,
    SEVEN,
    difference,
    edit,
    fast,
    hf_logits,
    hugging_face,
    logits,
    peft_read,
    rewrite,
)
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional
from fastlora.adapters.create import lora
from fastlora.adapters.edits.merging import merge
from fastlora.adapters.init.from_weights import _QUANTISERS, factors, int8_rounded, randomised_svd
from fastlora.errors import CheckpointError
from fastlora.formats.peft import writing
from fastlora.formats.peft.names import named_leaves, peft_state_dict
from fastlora.formats.peft.reading import load_adapter
from fastlora.models.init_offset import cast_offset, offsets, without_offset
from fastlora.models.names import projection_path
from fastlora.runtime.gradients import value_and_grad

# Arguments that mean the same to fastlora.lora and to peft.LoraConfig, over two layers.
MOVING = {
    "pissa": dict(r=4, init_lora_weights="pissa"),
    "pissa, alpha": dict(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=SEVEN),
    "pissa, rslora": dict(r=8, lora_alpha=4, init_lora_weights="pissa", use_rslora=True),
    "pissa, patterns": dict(
        r=4,
        target_modules=SEVEN,
        init_lora_weights="pissa",
        rank_pattern={"q_proj": 6, r"layers\.1\.mlp\.\w+": 2},
        alpha_pattern={"down_proj": 3, "1.self_attn.o_proj": 6},
    ),
    "pissa, rslora, patterns": dict(
        r=4,
        init_lora_weights="pissa",
        use_rslora=True,
        rank_pattern={"v_proj": 7},
        alpha_pattern={"q_proj": 3},
    ),
    "pissa, one layer": dict(r=4, init_lora_weights="pissa", layers_to_transform=[1]),
    "pissa, DoRA": dict(r=4, lora_alpha=8, init_lora_weights="pissa", use_dora=True),
    "olora": dict(r=4, lora_alpha=8, init_lora_weights="olora", target_modules=SEVEN),
    "olora, rslora": dict(r=3, init_lora_weights="olora", use_rslora=True),
}
BOTH = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}
HALVES = (torch.float16, torch.bfloat16)
OWN = {"pissa_niter_4": {}, "loftq": {"loftq_config": {"loftq_bits": 8, "loftq_iter": 2}}}


ALL = [*MOVING.values(), *({"r": 4, "init_lora_weights": i} | more for i, more in OWN.items())]


def settings_of(case):
    return BOTH | MOVING[case]


def shaken(model, std=0.05, seed=1):
    """The model with every adapter tensor a little off its start."""
    gen = torch.Generator().manual_seed(seed)
    noise = lambda t: t + (std * torch.randn(t.shape, generator=gen)).to(t.dtype)
    return model.with_adapter(tree_map(noise, model.adapter))


def peft_moved(model, dtype=torch.float32, **settings):
    """PEFT's own model of these settings, over its moved base, with fastlora's A and B."""
    oracle = get_peft_model(
        hugging_face(FORWARD, dtype), PeftConfig(**settings, task_type="CAUSAL_LM")
    )
    ours = peft_state_dict(model.adapter, model.spec.lora)
    peft.set_peft_model_state_dict(oracle, {k: v.detach().clone() for k, v in ours.items()})
    return oracle.eval()


def same_objects(one, other):
    return all(x is y for x, y in zip(tree_leaves(one), tree_leaves(other), strict=True))


def start_leaves(model):
    return [x for params in model.base["layers"] for pair in offsets(params).values() for x in pair]


# ── the values are PEFT's ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", MOVING)
def test_first_factors_are_those_of_peft(case):
    oracle = get_peft_model(hugging_face(FORWARD), PeftConfig(**settings_of(case)))
    theirs = get_peft_model_state_dict(oracle)
    model = lora(fast(FORWARD), **settings_of(case))
    ours = peft_state_dict(model.adapter, model.spec.lora)
    assert ours.keys() == theirs.keys()
    for key, a in ours.items():
        if "lora_A" in key:  # up to the sign of a direction, which the product does not have
            b = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(ours[b] @ a, theirs[b] @ theirs[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", MOVING)
def test_logits_are_those_of_peft_over_its_moved_base(case):
    model = shaken(lora(fast(FORWARD), **settings_of(case)))
    oracle = peft_moved(model, **settings_of(case))
    assert difference(logits(model), hf_logits(oracle), logits(fast(FORWARD))) <= 1e-5


@pytest.mark.parametrize("case", MOVING)
def test_a_step_is_that_of_peft_over_its_moved_base(case):
    model = shaken(lora(fast(FORWARD), **settings_of(case)))
    oracle = peft_moved(model, **settings_of(case))
    batch = {"input_ids": IDS, "labels": IDS}
    _, grads = value_and_grad(functional.loss)(model.adapter, model.base, model.spec, batch)
    oracle(input_ids=IDS, labels=IDS).loss.backward()
    theirs = {
        name.replace(".default", ""): p.grad
        for name, p in oracle.named_parameters()
        if "lora_" in name
    }
    ours = {k if k.endswith("weight") else f"{k}.weight": g for k, g in named_leaves(grads).items()}
    assert ours.keys() == theirs.keys()
    # Relative to the largest gradient of the tensor: DoRA's go up to 10 here.
    for key, g in ours.items():
        off = (g - theirs[key]).abs().max() / theirs[key].abs().max().clamp(min=1)
        assert off <= 1e-5, key


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_drops_inputs_of_the_adapter_only(use_dora):
    """y = (W - s B0 A0) x + s B A drop(x): over a base moved by hand it is an ordinary adapter."""
    settings = dict(r=4, lora_alpha=8, lora_dropout=0.4, use_dora=use_dora)
    model = shaken(lora(fast(FORWARD), init_lora_weights="pissa", **settings))
    layers = []
    for params in model.base["layers"]:
        moved = {}
        for name, start in offsets(params).items():
            rest = {k: x for k, x in params[name].items() if k != "offset"}
            moved[name] = rest | {"weight": rest["weight"] - 2 * start.b @ start.a}
        layers.append(params | moved)
    plain = dataclasses.replace(model, base=model.base | {"layers": tuple(layers)})
    run = lambda m, seed: functional.forward(m.adapter, m.base, m.spec, IDS, seed=seed)
    assert difference(run(model, 5), run(plain, 5), run(model, None)) <= 1e-5
    assert difference(run(model, None), run(plain, None), logits(fast(FORWARD))) <= 1e-5


# ── a fresh adapter is its base, which nobody touched ─────────────────────────────────────


@pytest.mark.parametrize("settings", ALL)
def test_fresh_adapter_equals_base(settings):
    base = fast(FORWARD)
    model = lora(base, **BOTH | settings)
    assert all(x.any() for x in tree_leaves(model.adapter))
    expected = logits(base)
    assert (logits(model) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", HALVES)
def test_fresh_adapter_equals_a_16_bit_base_to_its_rounding(dtype):
    base = fast(FORWARD, dtype)
    model = lora(base, r=4, lora_alpha=8, init_lora_weights="pissa")
    assert {x.dtype for x in start_leaves(model)} == {torch.float32}
    expected, eps = logits(base).float(), torch.finfo(dtype).eps
    # Four roundings of the largest logit; PEFT's moved and rounded base is no closer (below).
    assert (logits(model).float() - expected).abs().max() <= 4 * eps * expected.abs().max()
    oracle = hf_logits(
        peft_moved(model, dtype, r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=SEVEN)
    ).float()
    ours, theirs = ((x - expected).norm() for x in (logits(model).float(), oracle))
    assert ours <= 1.5 * theirs


def test_the_base_is_shared_and_comes_back():
    base = fast(FORWARD)
    model = shaken(lora(base, r=4, init_lora_weights="pissa"))
    for plain in (fastlora.disable(model), model.with_adapter(None)):
        assert same_objects(plain.base, base.base)
        assert not start_leaves(plain)
        assert torch.equal(logits(plain), logits(base))
    shared = {id(x) for x in tree_leaves(model.base)}
    assert all(id(x) in shared for x in tree_leaves(base.base))
    without = functional.forward(None, model.base, model.spec, IDS)
    assert torch.equal(without, logits(base))


def test_start_factors_have_memory_of_their_own():
    model = lora(fast(FORWARD), r=4, init_lora_weights="olora")
    trained = model.for_training()
    with torch.no_grad():
        for leaf in tree_leaves(trained.adapter):
            leaf.zero_()
    assert all(x.any() for x in start_leaves(model))


def test_start_factors_are_not_counted():
    plain = lora(fast(FORWARD), r=4)
    model = lora(fast(FORWARD), r=4, init_lora_weights="pissa")
    for trainable in (True, False):
        assert model.num_parameters(trainable) == plain.num_parameters(trainable)


def test_a_seed_is_a_value():
    a, b, c = (
        tree_leaves(lora(fast(FORWARD), init_lora_weights="pissa_niter_2", random_state=s).adapter)
        for s in (1, 1, 2)
    )
    assert same_bits(a, b) and not same_bits(a, c)


def test_start_factors_are_cast_with_the_adapter():
    params = lora(fast(FORWARD), r=4, init_lora_weights="pissa").base["layers"][0]
    assert cast_offset(params, torch.float32) is params
    narrow = offsets(cast_offset(params, torch.bfloat16))
    assert {x.dtype for pair in narrow.values() for x in pair} == {torch.bfloat16}


# ── every way to run it ───────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Two layers in float64 with start factors, dropout 0.2, A and B off their start."""
    base = fastlora.disable(read_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2))
    settings = dict(r=2, init_lora_weights="pissa", lora_dropout=0.2, adapter_dtype="float64")
    return shaken(lora(base, **settings))


BATCH = {
    "input_ids": torch.tensor([[3, 5, 7, 11, 2, 9]]),
    "labels": torch.tensor([[3, 5, 7, 11, 2, 9]]),
}


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload", 0.0, 0.3, 0.8])
@pytest.mark.parametrize("seed", [None, 3])
def test_gradients_are_those_of_torch_func_under_every_policy(started, recompute, seed):
    model = started.with_spec(recompute=recompute, compile=False)
    args = (model.base, model.spec, BATCH)
    value, grads = value_and_grad(functional.loss)(model.adapter, *args, seed=seed)
    expected, plain = torch.func.grad_and_value(functional.loss)(model.adapter, *args, seed=seed)
    torch.testing.assert_close(value, plain)
    for g, e in zip(tree_leaves(grads), tree_leaves(expected), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_vmap_over_adapters_is_one_by_one(started):
    two = [shaken(started, seed=s).adapter for s in (1, 2)]
    stacked = tree_map(lambda *xs: torch.stack(xs), *two)
    run = lambda adapter: functional.loss(adapter, started.base, started.spec, BATCH)
    together = torch.func.vmap(run)(stacked)
    torch.testing.assert_close(together, torch.stack([run(a) for a in two]))


def test_forward_derivative_is_the_limit_of_differences(started):
    direction = tree_map(torch.ones_like, started.adapter)
    run = lambda adapter: functional.loss(adapter, started.base, started.spec, BATCH)
    _, slope = torch.func.jvp(run, (started.adapter,), (direction,))
    ahead, behind = (
        run(tree_map(lambda x, d, h=h: x + h * d, started.adapter, direction))
        for h in (1e-6, -1e-6)
    )
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.compile
def test_compiled_gradient_equals_eager(started, fresh_dynamo, region_backend):
    region_backend("aot_eager")
    run = lambda compile: value_and_grad(functional.loss)(
        started.adapter, started.base, started.with_spec(compile=compile).spec, BATCH, seed=3
    )
    for c, e in zip(tree_leaves(run(True)), tree_leaves(run(False)), strict=True):
        torch.testing.assert_close(c, e, rtol=1e-9, atol=1e-12)


def test_generation_is_that_of_the_merged_model(started):
    ids = torch.tensor([[3, 5, 7], [4, 9, 2]])
    args = dict(max_new_tokens=8, eos_token_id=())
    assert torch.equal(started.generate(ids, **args), merge(started).generate(ids, **args))


def test_a_move_takes_the_start_factors_along(started):
    moved = started.to("cpu")
    assert torch.equal(moved(BATCH["input_ids"]), started(BATCH["input_ids"]))
    assert len(start_leaves(moved)) == len(start_leaves(started)) > 0


# ── loftq ─────────────────────────────────────────────────────────────────────────────────


def weights():
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(0))


def loftq_error(bits, iterations, scaling, r=8):
    """||W - (Q + s B0 A0)||, Q what is left of the last rest after quantising."""
    w, gen = weights(), torch.Generator()
    before = None
    if iterations > 1:
        before = factors(w, "loftq", r, scaling, gen, (bits, iterations - 1))
    rest = w if before is None else w - scaling * before.b @ before.a
    found = factors(w, "loftq", r, scaling, gen, (bits, iterations))
    return (w - _QUANTISERS[bits](rest) - scaling * found.b @ found.a).norm().item()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_as_close_for_every_scaling(bits, iterations):
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    one, two, half = (loftq_error(bits, iterations, s) for s in (1.0, 2.0, 0.5))
    assert two == pytest.approx(one, rel=1e-4) and half == pytest.approx(one, rel=1e-4)
    w = weights()
    assert one < 0.9 * (w - _QUANTISERS[bits](w)).norm().item()


@pytest.mark.parametrize(("bits", "iterations"), [(4, 1), (4, 3), (8, 1)])
def test_loftq_at_scaling_1_is_the_loop_of_peft(bits, iterations):
    """PEFT's loop wants CUDA, so it is written out here over bitsandbytes' own functions."""
    bnb = pytest.importorskip("bitsandbytes").functional
    # Half: bitsandbytes quantises a half-precision copy to 8 bits, of later rests another one.
    w, r = weights().half().float(), 8
    rest = w
    for _ in range(iterations):
        if bits == 4:
            q = bnb.dequantize_4bit(
                *bnb.quantize_4bit(rest, compress_statistics=False, quant_type="nf4")
            )
        else:
            q = bnb.int8_vectorwise_dequant(*bnb.int8_vectorwise_quant(rest.half())[:2]).float()
        u, s, vh = torch.linalg.svd(w - q)
        product = u[:, :r] @ torch.diag(s[:r]) @ vh[:r]
        rest = w - product
    found = factors(w, "loftq", r, 1.0, torch.Generator(), (bits, iterations))
    torch.testing.assert_close(found.b @ found.a, product, rtol=0, atol=1e-5)


def test_int8_rows_err_by_half_a_step():
    w = torch.cat([weights(), torch.zeros(1, 64)])
    step = w.abs().amax(-1, keepdim=True) / 127
    assert ((int8_rounded(w) - w).abs() <= step / 2 + 1e-7).all()


def test_randomised_svd_finds_the_largest_directions():
    gen = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(40, 20, generator=gen))
    v, _ = torch.linalg.qr(torch.randn(30, 20, generator=gen))
    w = u @ torch.diag(2.0 ** -torch.arange(20)) @ v.T
    left, s, right = randomised_svd(w, 4, 4, gen)
    torch.testing.assert_close(s, 2.0 ** -torch.arange(4), rtol=1e-4, atol=0)
    best = u[:, :4] @ torch.diag(s) @ v[:, :4].T
    torch.testing.assert_close(left @ torch.diag(s) @ right, best, rtol=0, atol=1e-3)


# ── folders ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "settings",
    ALL,
)
def test_peft_loads_the_export_on_the_untouched_base(settings, tmp_path):
    model = shaken(lora(fast(FORWARD), **BOTH | settings))
    model.save_pretrained(tmp_path)
    base = logits(fast(FORWARD))
    assert difference(hf_logits(peft_read(FORWARD, tmp_path)), logits(model), base) <= 1e-5
    back = load_adapter(model, tmp_path)  # over a base that has start factors already
    assert not start_leaves(back)
    assert difference(logits(back), logits(model), base) <= 1e-5


def test_the_export_says_twice_the_rank_and_the_same_scaling(tmp_path):
    for rslora, alpha in ((False, 24.0), (True, 12 * 2**0.5)):
        model = lora(
            fast(FORWARD), r=4, lora_alpha=12, init_lora_weights="pissa", use_rslora=rslora
        )
        model.save_pretrained(tmp_path)
        back = load_adapter(fast(FORWARD), tmp_path).spec.lora
        assert (back.r, back.lora_alpha, back.init_lora_weights) == (8, alpha, True)
        scalings = [[t.scaling for t in ts] for ts in back.targets]
        expected = [[t.scaling for t in ts] for ts in model.spec.lora.targets]
        torch.testing.assert_close(torch.tensor(scalings), torch.tensor(expected))


def test_an_adapter_without_its_start_factors_is_not_saved(tmp_path):
    model = lora(fast(FORWARD), init_lora_weights="olora")
    model = replace(model, base=without_offset(model.base))
    with pytest.raises(ValueError, match=r"model\.save_pretrained"):
        writing.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("how", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_folders_of_peft_that_move_the_base_load_with_its_logits(init, how, tmp_path):
    settings = dict(r=4, lora_alpha=8, target_modules=SEVEN, init_lora_weights=init, **how)
    oracle = get_peft_model(hugging_face(FORWARD), PeftConfig(**settings, task_type="CAUSAL_LM"))
    gen = torch.Generator().manual_seed(2)
    for name, p in oracle.named_parameters():
        if "lora_" in name:
            p.data += 0.05 * torch.randn(p.shape, generator=gen)
    oracle.save_pretrained(tmp_path)
    model = load_adapter(fast(FORWARD), tmp_path)
    base = logits(fast(FORWARD))
    assert difference(logits(model), hf_logits(oracle.eval()), base) <= 1e-5
    again = PeftModel.from_pretrained(hugging_face(FORWARD), tmp_path).eval()
    assert difference(logits(model), hf_logits(again), base) <= 1e-5
    model.save_pretrained(tmp_path / "converted")
    converted = hf_logits(peft_read(FORWARD, tmp_path / "converted"))
    assert difference(converted, hf_logits(oracle), base) <= 1e-5
    edit(tmp_path, init_lora_weights=True)  # what forgetting the moved base would give
    wrong = logits(load_adapter(fast(FORWARD), tmp_path))
    assert (wrong - hf_logits(oracle)).abs().max() > 1e-2


def test_a_folder_that_peft_converted_loads(tmp_path):
    settings = dict(r=4, lora_alpha=8, target_modules=SEVEN, init_lora_weights="pissa_niter_4")
    oracle = get_peft_model(hugging_face(FORWARD), PeftConfig(**settings, task_type="CAUSAL_LM"))
    oracle.peft_config["default"].init_lora_weights = True  # as PEFT's examples do
    oracle.save_pretrained(tmp_path / "fresh")
    oracle.peft_config["default"].init_lora_weights = "pissa_niter_4"
    for name, p in oracle.named_parameters():
        if "lora_" in name:
            p.data *= 1.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle.save_pretrained(
            tmp_path / "new", path_initial_model_for_weight_conversion=str(tmp_path / "fresh")
        )
    model = load_adapter(fast(FORWARD), tmp_path / "new")
    expected = hf_logits(oracle.eval())
    assert difference(logits(model), expected, logits(fast(FORWARD))) <= 1e-5


@pytest.mark.parametrize("init", ["pissa_niter_4", "loftq", "corda", "lora_ga"])
def test_folders_that_peft_cannot_reproduce_are_refused_with_the_cure(init, tmp_path):
    shaken(lora(fast(FORWARD), r=4)).save_pretrained(tmp_path)
    edit(tmp_path, init_lora_weights=init)
    with pytest.raises(CheckpointError) as refused:
        load_adapter(fast(FORWARD), tmp_path)
    for part in (f"init_lora_weights='{init}'", "not in the folder", "path_initial_model_for"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [(dict(r=70), "70"), (dict(lora_alpha=0), "root"), (dict(lora_alpha=-8), "root")],
)
def test_settings_no_pissa_has_are_refused(fields, message, tmp_path):
    shaken(lora(fast(FORWARD), r=4)).save_pretrained(tmp_path)
    edit(tmp_path, init_lora_weights="pissa", **fields)
    if "r" in fields:
        grow = lambda x: torch.zeros([70 if n == 4 else n for n in x.shape])
        rewrite(tmp_path, lambda tensors: {k: grow(x) for k, x in tensors.items()})
    with pytest.raises(CheckpointError, match=message):
        load_adapter(fast(FORWARD), tmp_path)


# ── merge, combine, train ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_merge_equals_apply(how, tmp_path):
    model = shaken(lora(fast(FORWARD), r=4, lora_alpha=8, init_lora_weights="pissa", **how))
    merged, base = merge(model), logits(fast(FORWARD))
    assert merged.adapter is None and not start_leaves(merged)
    assert difference(logits(merged), logits(model), base) <= 1e-5
    model.save_pretrained_merged(tmp_path)
    read, _ = fastlora.load(tmp_path, dtype="float32", device="cpu")
    rounded = tree_map(lambda x: x.bfloat16().float(), merged.base)
    assert same_bits(read.base, rounded)


def test_combine_takes_what_they_do_over_the_base(tmp_path):
    base = fast(FORWARD)
    one = shaken(lora(base, r=4, init_lora_weights="pissa"), seed=1)
    two = shaken(lora(base, r=3, init_lora_weights="olora"), seed=2)
    three = adapted(base, r=2)
    found = fastlora.combine([one, two, three], [0.5, 0.3, 0.2], "cat")
    assert not start_leaves(found)
    assert same_objects(found.base, base.base)
    merged = [merge(m) for m in (one, two, three, found)]
    for i, ts in enumerate(found.spec.lora.targets):
        for t in ts:
            weight = lambda m, i=i, t=t: m.base["layers"][i][t.name]["weight"]
            of_one, of_two, of_three, of_found = (weight(m) - weight(base) for m in merged)
            expected = 0.5 * of_one + 0.3 * of_two + 0.2 * of_three
            torch.testing.assert_close(of_found, expected, rtol=0, atol=1e-5)


def test_a_resumed_run_is_the_same_run(tmp_path):
    """Start factors come from the checkpoint: another random_state would have given others."""
    model, tokenizer = fastlora.load("demo", device="cpu")
    rows = [{"text": f"number {i} follows number {i - 1}."} for i in range(16)]
    settings = dict(batch_size=2, save_every=2, progress=False, train_on="all", packing=False)
    settings |= dict(learning_rate=1e-3, lr_scheduler="constant", warmup_ratio=0.0)
    begin = lambda state: lora(
        model, r=4, init_lora_weights="pissa_niter_1", random_state=state, recompute="none"
    )
    whole, _ = fastlora.train(
        begin(1), tokenizer, rows, max_steps=4, **settings, output_dir=tmp_path / "a"
    )
    fastlora.train(begin(1), tokenizer, rows, max_steps=2, **settings, output_dir=tmp_path / "b")
    resumed, _ = fastlora.train(
        begin(2), tokenizer, rows, max_steps=4, **settings, output_dir=tmp_path / "b", resume=True
    )
    assert same_bits(resumed.adapter, whole.adapter)
    assert same_bits(start_leaves(resumed), start_leaves(whole))
    assert not same_bits(start_leaves(begin(2)), start_leaves(whole))
    ids = torch.tensor([[1, 5, 9]])
    saved = load_adapter(model, tmp_path / "b")
    torch.testing.assert_close(saved(ids), resumed(ids), rtol=0, atol=1e-2)


# ── what cannot be ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(init_lora_weights="pissa_niter_x"), "pissa_niter_x"),
        (dict(init_lora_weights="pissa", r=33), "rank of at most 16"),
        (dict(init_lora_weights="pissa", lora_alpha=-4), "more than 0"),
        (dict(init_lora_weights="pissa", lora_bias=True), "lora_bias=True needs"),
        (dict(loftq_config={"loftq_bits": 4}), "without init_lora_weights='loftq'"),
        (dict(init_lora_weights="loftq", loftq_config={"loftq_bits": 3}), "loftq_bits=3"),
        (dict(init_lora_weights="loftq", loftq_config={"loftq_iter": 0}), "loftq_iter=0"),
        (dict(init_lora_weights="loftq", loftq_config={"bits": 4}), "'bits'"),
        (dict(init_lora_weights="loftq", loftq_config=4), "loftq_config=4"),
        (dict(init_lora_weights="eva"), r"fastlora.initialize(model, batches, 'eva')"),
        (dict(init_lora_weights="corda"), r"fastlora.initialize(model, batches, 'corda')"),
        (dict(init_lora_weights="lora_ga"), r"fastlora.initialize(model, batches, 'lora_ga')"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lora(fast(FORWARD), **settings)


def test_peft_s_own_loftq_config_is_taken():
    given = peft.LoftQConfig(loftq_bits=8, loftq_iter=2)
    own = {"loftq_bits": 8, "loftq_iter": 2}
    one, two = (
        lora(fast(FORWARD), r=4, init_lora_weights="loftq", loftq_config=c) for c in (given, own)
    )
    assert same_bits(one.adapter, two.adapter)
    path = projection_path(0, "q_proj")
    assert path in "".join(peft_state_dict(one.adapter, one.spec.lora))
