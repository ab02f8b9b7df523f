"""Captured tensors are transformers' hidden states; capture and add change nothing else."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora import functional as FL
from fastlora.checkpoints.hub import DEMO
from fastlora.data.rows import read_rows
from fastlora.model import Model
from fastlora.models import decoder
from fastlora.models.capture import Taps, place_names, tapped_layer
from fastlora.models.layer import decoder_layer
from fastlora.runtime import host_offload
from fastlora.runtime.host_offload import HostStash
from oracles.expert_cases import EXPERT_CASES
from oracles.pairs import Pair, adapted
from oracles.transformers_side import left_padding, prompt
from oracles.trees import relative_error, same_bits, token_ids

IDS = token_ids(2, 9)


def places_of(model: Model) -> list[str]:
    return place_names(model.spec.config.num_hidden_layers)


def captured(
    model: Model, ids: Tensor | None = IDS, **how: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    trees = model.adapter, model.base, model.spec
    return FL.forward(*trees, ids, capture=places_of(model), **how)


def hidden_states(pair: Pair, ids: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    """transformers' tensors by place. Its last hidden state is the final norm's output, so the last
    layer's output comes from a hook, as do those of attention and MLP."""
    oracle: Any = pair.fresh_oracle()
    found: dict[str, Tensor] = {}

    def keep(place: str):
        def hook(module, args, result):
            found[place] = result[0] if isinstance(result, tuple) else result

        return hook

    for i, layer in enumerate(oracle.model.layers):
        ends = layer.self_attn, layer.mlp
        if hasattr(layer, "post_feedforward_layernorm"):  # what is added is normed
            ends = layer.post_attention_layernorm, layer.post_feedforward_layernorm
        for module, place in zip(ends, ("attn.out", "mlp.out"), strict=True):
            module.register_forward_hook(keep(f"layers.{i}.{place}"))
        layer.register_forward_hook(keep(f"layers.{i}.out"))
    if (mask := inputs.get("attention_mask")) is not None:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        states = oracle(ids, output_hidden_states=True, **inputs).hidden_states
    found |= {f"layers.{i}.in": x for i, x in enumerate(states[:-1])}
    return found | {"embed": states[0], "norm": states[-1]}


@pytest.mark.parametrize(
    "family",
    [
        *("llama3.1", "llama_bias", "mistral", "qwen3", "smollm3", "mixtral", "qwen3_moe_mixed"),
        *("olmo3", "gemma2", "phi3"),
    ],
)
def test_captured_tensors_equal_transformers(family, pair):
    one, ids, mask = pair(family), prompt(2, 9), left_padding(9, 6)
    for more in ({}, {"attention_mask": mask}):
        ours, theirs = captured(one.model, ids, **more)[1], hidden_states(one, ids, **more)
        assert ours.keys() == theirs.keys() == set(places_of(one.model))
        for place, x in ours.items():
            y = theirs[place].view(x.shape)
            real = mask.bool() if more else slice(None)
            assert relative_error(x[real], y[real]) <= 1e-5, place


Q = ["q_proj", "v_proj", "o_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dropout": ("llama2", dict(lora_dropout=0.3), dict(seed=3)),
    "padded": ("qwen2", {}, dict(attention_mask=left_padding(9, 5))),
    "packed": ("mistral", {}, dict(segment_ids=(torch.arange(9) // 4).expand(2, 9))),
    "DoRA": ("qwen3", dict(use_dora=True, lora_dropout=0.1), dict(seed=3)),
    "experts": (*EXPERT_CASES["experts, router and attention"], {}),
    "QAT": ("llama2", dict(qat_scheme="int8"), {}),
    "norms around": ("gemma2", {}, {}),
    "embedding and head": ("llama2", dict(target_modules=[*Q, "embed_tokens", "lm_head"]), {}),
    "copies": ("llama2", dict(modules_to_save=["norm", "embed_tokens"], target_modules=Q), {}),
}


def assert_nothing_changes(model: Model, how: dict[str, Any]) -> None:
    """Bits of the logits, with gradients recorded: recompute levels act only then."""
    model = model.for_training()
    plain = model(IDS, **how)
    logits, tensors = captured(model, **how)
    assert same_bits(logits, plain)
    assert [*tensors] == places_of(model)
    zero = torch.zeros(model.spec.config.hidden_size)
    assert same_bits(model(IDS, **how, add=dict.fromkeys(places_of(model), zero)), plain)
    assert same_bits(captured(model, None, **how, inputs_embeds=tensors["embed"])[0], plain)
    for i in range(model.spec.config.num_hidden_layers):
        x, a, m, y = (tensors[f"layers.{i}.{k}"] for k in ("in", "attn.out", "mlp.out", "out"))
        assert same_bits(x + a + m, y)


@pytest.mark.parametrize("case", CASES)
def test_capture_and_zeros_and_embedded_ids_change_no_bit(case, pair):
    family, settings, how = CASES[case]
    assert_nothing_changes(adapted(pair(family).model, **{"r": 4} | settings), how)


@pytest.mark.parametrize("policy", ["none", "full", "offload", 0.45, 0.3])
def test_no_recompute_policy_changes_a_bit(policy, tiny, monkeypatch):
    """0.45 and 0.3 mix the levels between. The MLP runs in two chunks."""
    monkeypatch.setattr("fastlora.models.levels._CHUNK_TOKENS", 9)
    assert_nothing_changes(tiny.with_spec(recompute=policy), {})


def test_a_quantised_base_changes_no_bit(quantised_folder):
    model, _ = fastlora.load(quantised_folder("nf4"), device="cpu")
    assert_nothing_changes(adapted(model, r=4), {})


def test_16_bit_sums_are_rounded_once(pair):
    model = pair("llama2", torch.bfloat16).model
    assert_nothing_changes(adapted(model, r=4), {})
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    plain, moved = captured(model)[1], captured(model, add={"layers.0.out": v})[1]
    expected = (plain["layers.0.out"].float() + v).bfloat16()
    assert same_bits(moved["layers.0.out"], expected)
    assert moved["norm"].dtype == torch.bfloat16


def test_noise_is_captured_and_not_added_to_given_embeddings(tiny):
    noisy = replace(tiny, spec=replace(tiny.spec, neftune_alpha=5.0))
    logits, tensors = captured(noisy, seed=3)
    assert not same_bits(tensors["embed"], captured(noisy)[1]["embed"])
    assert same_bits(noisy(inputs_embeds=tensors["embed"], seed=3), logits)


def test_a_layer_without_places_inside_is_called_as_it_is_without_taps():
    """The same function, arguments and static arguments, so the same compiled graph."""
    rest, static = (object(),), (object(),)
    vector = torch.ones(16)
    for taps in (Taps(), Taps(["embed", "layers.0.in", "layers.1.mlp.out"], {"norm": vector})):
        assert taps.layer(0, rest, static) == (decoder_layer, rest, static)
    for taps in (Taps(["layers.0.attn.out"]), Taps(add={"layers.0.mlp.out": vector})):
        assert taps.layer(0, rest, static)[0] is tapped_layer


# ── add ───────────────────────────────────────────────────────────────────────────────────


def test_a_tensor_is_added_at_its_place_and_nowhere_else(tiny):
    """Shapes [d], [t, d], [b, 1, d] and a number. Places before it are the same."""
    gen = torch.Generator().manual_seed(0)
    plain = captured(tiny)[1]
    order = places_of(tiny)
    shapes = [(16,), (9, 16), (2, 1, 16), (1,), (2, 9, 16)]
    for i, place in enumerate(order):
        v = torch.randn(shapes[i % len(shapes)], generator=gen, dtype=torch.float64)
        moved = captured(tiny, add={place: v})[1]
        assert same_bits(moved[place], plain[place] + v), place
        assert all(same_bits(moved[before], plain[before]) for before in order[:i])
        assert not same_bits(moved["norm"], plain["norm"])


def test_one_layers_output_is_the_next_ones_input(tiny):
    v = torch.ones(16, dtype=torch.float64)
    at = lambda *places: tiny(IDS, add=dict.fromkeys(places, v))
    assert same_bits(at("embed"), at("layers.0.in"))
    assert same_bits(at("layers.0.out"), at("layers.1.in"))
    torch.testing.assert_close(at("layers.1.mlp.out"), at("layers.1.out"))
    assert relative_error(at("layers.1.attn.out"), at("layers.1.out")) > 1e-3


# ── the stash of recompute="offload" ──────────────────────────────────────────────────────


def test_captured_tensors_stay_when_activations_wait_on_the_host(tiny, monkeypatch):
    def step():
        vector = torch.full((16,), 0.3, dtype=torch.float64)

        def value(vector):
            _, tensors = captured(tiny, add={"layers.0.attn.out": vector}, seed=3)
            return sum((x**2).sum() for x in tensors.values())

        return fastlora.value_and_grad(value)(vector)

    expected, stashes = step(), []

    def stash(spec, x):
        stashes.append(HostStash(x.device))
        return stashes[-1]

    monkeypatch.setattr(decoder, "_stash", stash)
    monkeypatch.setattr(host_offload, "_MIN_BYTES", 0)
    assert relative_error(step(), expected) < 1e-12
    assert any(stashes[0].host)


# ── a use ─────────────────────────────────────────────────────────────────────────────────


def test_a_linear_probe_tells_methods_from_functions_in_a_middle_layer():
    """At the last token of the demo's prompts, which all rows share: `embed` tells nothing."""
    model, tokenizer = fastlora.load("demo", dtype="float32", device="cpu")
    rows: dict[bool, list[list[int]]] = {True: [], False: []}
    for row in read_rows(DEMO / "train.jsonl")[:1500]:
        question = row["messages"][:1]
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)
        rows["class " in question[0]["content"]].append(ids)
    rows = {kind: [x for x in some if len(x) <= 48][:60] for kind, some in rows.items()}
    length = max(len(ids) for some in rows.values() for ids in some)
    every = [[0] * (length - len(ids)) + ids for some in rows.values() for ids in some]
    mask = [[0] * (length - len(i)) + [1] * len(i) for some in rows.values() for i in some]
    places = ("embed", "layers.3.out")
    with torch.no_grad():
        _, found = model(torch.tensor(every), attention_mask=torch.tensor(mask), capture=places)
    kinds = torch.tensor([1.0] * 60 + [-1.0] * 60)
    trained = torch.arange(120) % 2 == 0
    accuracy = {}
    for place in places:
        x = found[place][:, -1]
        x = torch.cat(
            [(x - x[trained].mean(0)) / (x[trained].std(0) + 1e-3), x.new_ones(120, 1)], 1
        )
        a, b = x[trained], kinds[trained]
        w = a.T @ torch.linalg.solve(a @ a.T + 10 * torch.eye(60), b)
        accuracy[place] = ((x[~trained] @ w).sign() == kinds[~trained]).float().mean().item()
    assert accuracy["layers.3.out"] >= 0.9
    assert accuracy["embed"] <= 0.6
