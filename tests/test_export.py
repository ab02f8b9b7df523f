"""PEFT folders out and in, merging, Hugging Face folders out. Oracles: PEFT and transformers.

B is random and large, and every comparison first asserts that the adapter moves the logits by at
least 1000 tolerances, so that a scaling that is 1 % off cannot pass. scripts/compare_peft.py prints
what these cases measure.
"""

import copy
import dataclasses
import functools
import json
import os
import re
import tempfile
import warnings
from pathlib import Path

import huggingface_hub
import peft
import pytest
import tokenizers
import torch
from models import FAMILIES, make_checkpoint
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastlora import functional
from fastlora.adapters.create import lora
from fastlora.adapters.edits.merging import merge
from fastlora.adapters.init.from_weights import moves_base
from fastlora.checkpoints import tensors
from fastlora.errors import CheckpointError
from fastlora.formats import tensors_out
from fastlora.formats.merged import save_merged
from fastlora.formats.peft.names import peft_state_dict
from fastlora.formats.peft.reading import load_adapter
from fastlora.formats.peft.writing import push_to_hub, save_adapter
from fastlora.model import Model
from fastlora.models.config_json import config_from_json
from fastlora.models.names import base_from_tensors, projection_path, tensors_from_base
from fastlora.models.spec import Spec
from fastlora.runtime.gradients import value_and_grad
from fastlora.text.tokenizer import Tokenizer

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Arguments that mean the same to fastlora.lora and to peft.LoraConfig, over two layers.
CASES = {
    "two names": dict(r=4, target_modules=["q_proj", "v_proj"]),
    "seven names": dict(r=4, target_modules=SEVEN),
    "all-linear": dict(r=3, lora_alpha=5, target_modules="all-linear"),
    "regex": dict(r=4, target_modules=r".*\.[01]\.(mlp\.down|self_attn\.v)_proj"),
    "exclude a list": dict(r=4, target_modules=SEVEN, exclude_modules=["0.mlp.up_proj", "k_proj"]),
    "exclude a regex": dict(r=4, target_modules=SEVEN, exclude_modules=r".*\.1\.mlp.*"),
    "one layer": dict(r=4, target_modules=SEVEN, layers_to_transform=[1]),
    "layers_pattern": dict(
        r=4, target_modules=["v_proj", "up_proj"], layers_to_transform=0, layers_pattern="layers"
    ),
    "full name and layers": dict(
        r=4, target_modules=["model.layers.0.mlp.up_proj", "v_proj"], layers_to_transform=[1]
    ),
    "dropout": dict(r=4, lora_alpha=8, target_modules=["v_proj", "o_proj"], lora_dropout=0.3),
    "rslora": dict(r=8, lora_alpha=4, target_modules=SEVEN, use_rslora=True),
    "rank_pattern": dict(r=4, target_modules=SEVEN, rank_pattern={r".*\.mlp\.\w+": 2, "q_proj": 6}),
    "alpha_pattern": dict(r=4, target_modules=SEVEN, alpha_pattern={"^model.layers.1.*": 24}),
    "both patterns, rslora": dict(
        r=4,
        target_modules=SEVEN,
        rank_pattern={r"layers\.0\.mlp\.down_proj": 2, "v_proj": 7},
        alpha_pattern={"down_proj": 3, "1.self_attn.o_proj": 6},
        use_rslora=True,
    ),
    "gaussian": dict(r=4, target_modules=["o_proj", "down_proj"], init_lora_weights="gaussian"),
    "lora_bias": dict(r=4, lora_alpha=8, target_modules=SEVEN, lora_bias=True),
    "lora_bias, one layer": dict(
        r=4, target_modules=["v_proj", "down_proj"], lora_bias=True, layers_to_transform=[1]
    ),
    "DoRA": dict(r=4, lora_alpha=8, target_modules=SEVEN, use_dora=True),
    "DoRA, rslora, patterns": dict(
        r=4, target_modules=SEVEN, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 6}
    ),
    "orthogonal": dict(r=4, target_modules=SEVEN, init_lora_weights="orthogonal"),
    "pissa": dict(r=4, lora_alpha=8, target_modules=SEVEN, init_lora_weights="pissa"),
    "pissa, rslora, patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=SEVEN,
        init_lora_weights="pissa",
        use_rslora=True,
        rank_pattern={"q_proj": 6},
        alpha_pattern={"layers.1.mlp.down_proj": 3},
    ),
    "pissa, DoRA": dict(
        r=4, lora_alpha=8, target_modules=SEVEN, init_lora_weights="pissa", use_dora=True
    ),
    "olora": dict(r=4, lora_alpha=8, target_modules=SEVEN, init_lora_weights="olora"),
    "rank above the width": dict(r=70, target_modules=["v_proj", "down_proj"]),
}
# Initialisations that PEFT cannot read back; what is saved here is plain LoRA to it.
OWN_STARTS = {
    "pissa_niter_4": dict(init_lora_weights="pissa_niter_4"),
    "loftq, 8 bits": dict(
        init_lora_weights="loftq", loftq_config={"loftq_bits": 8, "loftq_iter": 2}
    ),
    "loftq, 4 bits": dict(init_lora_weights="loftq"),
}
FORWARD = "llama2"  # the family of the cases; the others are run with "seven names"
IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(7))

# ── both sides of a comparison ────────────────────────────────────────────────────────────


@functools.cache
def session_folder():
    """Not tmp_path_factory: scripts/compare_peft.py calls what follows without pytest."""
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


def randomised(model, seed=1, std=0.15):
    """The model with normal A and B."""
    gen = torch.Generator().manual_seed(seed)
    noise = lambda t: std * torch.randn(t.shape, generator=gen).to(t.dtype)
    return model.with_adapter(tree_map(noise, model.adapter))


def peft_config(**settings):
    """PEFT's; of copies, as it changes lists that it is given (ensure_weight_tying)."""
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
        # Not of PEFT's making: torch's own deprecations.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        # Said of every lora_bias over a base without biases, PEFT's own adapters included.
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed but the targeted layer")
        # Said of every pattern for a parameter, PEFT's own adapters included, though it is used.
        warnings.filterwarnings(
            "ignore", r"The following \w+_pattern keys did not match any .*: \[[^,]*(gate|experts)"
        )
        # Said of rows that a tied pair shares, which are no "module".
        warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`, but no tied")
        # Said of every tied base part of which is trained, and whenever a tied pair is not.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        # Said of PEFT's own folders, whose config asks to move the base; ours never does.
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern")
        return PeftModel.from_pretrained(hugging_face(family, dtype), folder, **kwargs).eval()


@torch.no_grad()
def hf_logits(model):
    return model(input_ids=IDS).logits


@torch.no_grad()
def logits(model):
    return functional.forward(model.adapter, model.base, model.spec, IDS)


def difference(found, expected, base):
    """max|Δ| over max(1, absmax), once the adapter is seen to matter: T32 is 1e-5 of this."""
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
    model = randomised(lora(fast(family), **settings))
    model.save_pretrained(folder)
    base = logits(fast(family))
    return difference(hf_logits(peft_read(family, folder)), logits(model), base)


def peft_trainable(model, family, folder, settings):
    """PEFT's model with these very A and B; over its moved base where the init moves it."""
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
    model = randomised(lora(fast(family), **settings | {"lora_dropout": 0.0}), std=0.06)
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
    # Twice more than the module itself, beside bias="all"; PEFT does not read them.
    expected = {k: v for k, v in expected.items() if not re.search(r"_module\.|_to_save\.", k)}
    assert found.keys() == expected.keys()
    step = max((v - start[k]).abs().max().item() for k, v in expected.items())
    assert step >= 1e-3, f"a step of {step:.1e} shows nothing"
    return max((found[k] - v).abs().max().item() for k, v in expected.items()) / max(1, step)


# ── PEFT's folders in ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft_load_with_its_logits(case, tmp_path):
    assert import_difference(FORWARD, tmp_path, **CASES[case]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_peft_load_for_every_family(family, tmp_path):
    assert import_difference(family, tmp_path, **CASES["seven names"]) <= 1e-5


@pytest.mark.parametrize("init", [False, "orthogonal", "eva"])
def test_starts_that_leave_the_base_alone_load(init, tmp_path):
    peft_saved(FORWARD, tmp_path, r=4, target_modules=SEVEN)
    edit(tmp_path, init_lora_weights=init)
    plain = dataclasses.replace(load_adapter(fast(FORWARD), tmp_path))
    assert plain.spec.lora.init_lora_weights == init
    expected = hf_logits(PeftModel.from_pretrained(hugging_face(FORWARD), tmp_path).eval())
    assert difference(logits(plain), expected, logits(fast(FORWARD))) <= 1e-5


def test_overlapping_patterns_mean_what_peft_reads_in_the_file(tmp_path):
    # PEFT writes sorted keys: after the reload the narrow pattern comes second and never matches.
    patterns = {r"layers\.1\.self_attn\.q_proj": 60, "layers.1.self_attn..*": 2}
    assert (
        import_difference(FORWARD, tmp_path, r=4, target_modules=SEVEN, alpha_pattern=patterns)
        <= 1e-5
    )


def test_overlapping_ranks_that_peft_cannot_reload_are_refused_by_name(tmp_path):
    patterns = {"q_proj": 2, r"layers\.1\.self_attn\.q_proj": 6}
    first_wins = {r"layers\.1\.self_attn\.q_proj": 6, "q_proj": 2}
    peft_saved(FORWARD, tmp_path, r=4, target_modules=["q_proj"], rank_pattern=first_wins)
    edit(tmp_path, rank_pattern=patterns)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.lora_A"):
        load_adapter(fast(FORWARD), tmp_path)


def test_three_fields_are_a_config(tmp_path):
    peft_saved(FORWARD, tmp_path, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    whole = logits(load_adapter(fast(FORWARD), tmp_path))
    for config in (
        {"peft_type": "LORA", "r": 4, "target_modules": ["v_proj", "q_proj"]},
        {"peft_type": "LORA", "r": 4, "target_modules": None, "lora_alpha": 8.0},
        {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "no/such/model"},
        {"peft_type": "LORA", "r": 4, "a_field_of_tomorrow": None, "another": {}, "third": False},
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert torch.equal(logits(load_adapter(fast(FORWARD), tmp_path)), whole)


def test_what_peft_ignores_in_a_file_is_no_error(tmp_path):
    peft_saved(FORWARD, tmp_path, r=4, target_modules=["q_proj", "v_proj"])
    plain = load_adapter(fast(FORWARD), tmp_path)
    edit(
        tmp_path,
        target_modules=["q_proj", "v_proj", "query_key_value"],
        exclude_modules=["wq"],
        layers_to_transform=[0, 1, 2],
        rank_pattern={"wq": 8},
        fan_in_fan_out=True,
    )
    found = load_adapter(fast(FORWARD), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = hf_logits(PeftModel.from_pretrained(hugging_face(FORWARD), tmp_path).eval())
    assert torch.equal(logits(found), logits(plain))
    assert difference(logits(found), expected, logits(fast(FORWARD))) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_widths_load_as_float32(dtype, tmp_path):
    peft_saved(FORWARD, tmp_path, r=4, target_modules=SEVEN)
    rewrite(tmp_path, lambda tensors: {k: t.to(dtype) for k, t in tensors.items()})
    model = load_adapter(fast(FORWARD), tmp_path)
    assert {t.dtype for t in tree_leaves(model.adapter)} == {torch.float32}
    expected = hf_logits(peft_read(FORWARD, tmp_path))
    assert difference(logits(model), expected, logits(fast(FORWARD))) <= 1e-5


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda k: f"_orig_mod.{k}",
        lambda k: k.replace(".weight", ".default.weight"),
    ],
)
def test_keys_of_a_compiled_or_named_adapter_load(rename, tmp_path):
    peft_saved(FORWARD, tmp_path, r=4, target_modules=SEVEN)
    plain = tree_leaves(load_adapter(fast(FORWARD), tmp_path).adapter)
    rewrite(tmp_path, lambda tensors: {rename(k): t for k, t in tensors.items()})
    renamed = tree_leaves(load_adapter(fast(FORWARD), tmp_path).adapter)
    assert all(torch.equal(x, y) for x, y in zip(plain, renamed, strict=True))


def test_loading_replaces_the_adapter_and_leaves_the_model_as_it_was(tmp_path):
    first, second = (randomised(lora(fast(FORWARD), r=r), seed=r) for r in (2, 4))
    save_adapter(second, tmp_path)
    before = logits(first)
    swapped = load_adapter(first, tmp_path)
    assert torch.equal(logits(swapped), logits(second))
    assert torch.equal(logits(first), before)


# ── what cannot be read is refused by name ────────────────────────────────────────────────


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


REFUSED_FIELDS = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1},
    "monteclora_config": {"n": 1},
    "velora_config": {"n": 1},
    "use_bdlora": {"n": 1},
    "use_qalora": True,
    "layer_replication": [[0, 1], [0, 1]],
    "megatron_config": {"n": 1},
    "a_field_of_tomorrow": "on",
    "peft_type": "LOHA",
    "task_type": "SEQ_CLS",
    "init_lora_weights": "loftq",
    "r": "4",
    "lora_alpha": None,
    "target_modules": [1],
    "rank_pattern": ["q_proj"],
    "layers_to_transform": "0",
    "use_rslora": 1,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    peft_saved(FORWARD, folder, r=4, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture
def broken(saved, tmp_path):
    """A copy of a good adapter, to be broken."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_a_config_field_without_a_meaning_here_is_refused_by_name(field, broken):
    edit(broken, **{field: REFUSED_FIELDS[field]})
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json[^§]*{field}="):
        load_adapter(fast(FORWARD), broken)


@pytest.mark.parametrize("init", ["pissa_niter_4", "loftq", "corda", "lora_ga", "nonsense"])
def test_starts_that_change_the_base_are_refused(init, broken):
    edit(broken, init_lora_weights=init)
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{init}'"):
        load_adapter(fast(FORWARD), broken)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(target_modules=["wq"]), "'wq'"),
        (dict(target_modules=["norm"]), "no linear layer"),
        (dict(target_modules="("), "no regular expression"),
        (dict(r=0), "r=0"),
        (dict(rank_pattern={"q_proj": 2.5}), "rank_pattern"),
        (dict(target_modules=".*q_proj", layers_to_transform=[0]), "only filter a list"),
    ],
)
def test_settings_that_fit_no_model_are_refused(fields, message, broken):
    edit(broken, **fields)
    with pytest.raises(CheckpointError) as refused:
        load_adapter(fast(FORWARD), broken)
    assert message in str(refused.value)


def test_all_wrong_fields_are_listed_at_once(broken):
    edit(broken, use_qalora=True, bias=3, r="x", peft_type="IA3")
    with pytest.raises(CheckpointError) as refused:
        load_adapter(fast(FORWARD), broken)
    for part in ("use_qalora", "bias", "r='x'", "IA3"):
        assert part in str(refused.value)


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def without_prefix(tensors):
    return {k.removeprefix("base_model.model."): t for k, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ts: {k: t for k, t in ts.items() if k != KEY}, f"missing     {KEY}"),
        (lambda ts: ts | {KEY.replace("v_proj", "k_proj"): ts[KEY].clone()}, "target_modules"),
        (lambda ts: ts | {"base_model.model.lm_head.weight": ts[KEY].clone()}, "lm_head.weight"),
        (lambda ts: ts | {KEY: ts[KEY][:-1].clone()}, f"shape       {KEY}"),
        (lambda ts: ts | {KEY: ts[KEY] * float("nan")}, f"NaN or inf  {KEY}"),
        (lambda ts: ts | {KEY: ts[KEY].to(torch.int32)}, f"dtype       {KEY}"),
        (lambda ts: ts | {f"_orig_mod.{KEY}": ts[KEY].clone()}, "twice"),
        (without_prefix, "PEFT's keys begin with 'base_model.model.'"),
    ],
)
def test_wrong_tensors_are_refused_by_key(change, message, broken):
    rewrite(broken, change)
    model = fast(FORWARD)
    with pytest.raises(CheckpointError) as refused:
        load_adapter(model, broken)
    assert message in str(refused.value)
    assert "adapter_model.safetensors" in str(refused.value)
    assert model.adapter is None


def test_a_rank_that_differs_from_the_file_is_refused(broken):
    edit(broken, r=8)
    with pytest.raises(CheckpointError, match=r"file has \(4, 32\), the config says \(8, 32\)"):
        load_adapter(fast(FORWARD), broken)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_cut_file_is_refused(kept, broken):
    path = broken / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        load_adapter(fast(FORWARD), broken)


def test_a_broken_config_is_refused(broken):
    (broken / "adapter_config.json").write_text('{"r": 4,')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_adapter(fast(FORWARD), broken)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(file, broken):
    (broken / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load_adapter(fast(FORWARD), broken)


def test_a_pickle_is_never_read(broken):
    (broken / "adapter_model.safetensors").rename(broken / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        load_adapter(fast(FORWARD), broken)


def test_an_adapter_in_a_sub_folder_is_pointed_at(saved, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_bytes(
        (saved / "adapter_config.json").read_bytes()
    )
    with pytest.raises(FileNotFoundError, match=r"\['other'\]"):
        load_adapter(fast(FORWARD), tmp_path)


def test_smollm3_has_no_default_targets(broken):
    edit(broken, target_modules=None)
    with pytest.raises(CheckpointError, match="smollm3"):
        load_adapter(fast("smollm3"), broken)


# ── PEFT folders out ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_is_saved_with_the_same_logits(case, tmp_path):
    assert export_difference(FORWARD, tmp_path, **CASES[case]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_is_saved_for_every_family(family, tmp_path):
    assert export_difference(family, tmp_path, **CASES["seven names"]) <= 1e-5


@pytest.mark.parametrize("case", [c for c in CASES if c.split(",")[0] not in ("pissa", "olora")])
def test_saved_keys_shapes_and_dtypes_are_those_of_peft(case, tmp_path):
    model = lora(fast(FORWARD), **CASES[case])
    save_adapter(model, tmp_path)
    native = get_peft_model(hugging_face(FORWARD), PeftConfig(**CASES[case], task_type="CAUSAL_LM"))
    expected = {k: (t.shape, t.dtype) for k, t in get_peft_model_state_dict(native).items()}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: (t.shape, t.dtype) for k, t in tensors.items()} == expected


def test_patterns_keep_their_meaning_whatever_their_order(tmp_path):
    # The first match wins here; PEFT's own folder of this adapter cannot be read back.
    patterns = {"q_proj": 2, r"layers\.1\.self_attn\.q_proj": 6}
    alphas = {"v_proj": 40, r"layers\.1\.self_attn\.v_proj": 1}
    settings = dict(r=4, target_modules=SEVEN, rank_pattern=patterns, alpha_pattern=alphas)
    assert export_difference(FORWARD, tmp_path, **settings) <= 1e-5


@pytest.mark.parametrize("order", [sorted, lambda keys: sorted(keys, reverse=True)])
def test_saved_patterns_may_be_written_again_in_any_order(order, tmp_path):
    # PEFT sorts the keys of what it read when it saves it.
    patterns = {r"layers\.1\.self_attn\.q_proj": 6, "q_proj": 2, "0.mlp.*": 5, r"\w+_proj": 3}
    model = lora(fast(FORWARD), r=4, rank_pattern=patterns, alpha_pattern=patterns)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for field in ("rank_pattern", "alpha_pattern"):
        edit(tmp_path, **{field: {k: config[field][k] for k in order(config[field])}})
    assert load_adapter(fast(FORWARD), tmp_path).spec.lora.targets == model.spec.lora.targets


@pytest.mark.parametrize("case", ["seven names", "both patterns, rslora", "one layer"])
def test_a_step_of_training_goes_on_in_peft_as_here(case, tmp_path):
    assert step_difference(FORWARD, tmp_path, **CASES[case]) <= 1e-6


def test_transformers_own_loader_reads_it_too(tmp_path):
    model = randomised(lora(fast(FORWARD), r=4))
    save_adapter(model, tmp_path)
    hf = hugging_face(FORWARD)
    hf.load_adapter(str(tmp_path))
    assert difference(hf_logits(hf), logits(model), logits(fast(FORWARD))) <= 1e-5


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_bfloat16_errs_no_more_than_peft(variant, tmp_path):
    half = randomised(lora(fast(FORWARD, torch.bfloat16), r=4, **variant), std=0.1)
    assert {t.dtype for t in tree_leaves(half.adapter)} == {torch.float32}
    save_adapter(half, tmp_path)
    wide = dataclasses.replace(half, base=tree_map(lambda t: t.float(), half.base))
    exact, base = logits(wide), logits(dataclasses.replace(wide, adapter=None))
    assert (exact - base).abs().max() > 0.1
    error = lambda found: (found.float() - exact).square().mean().sqrt().item()
    theirs = error(hf_logits(peft_read(FORWARD, tmp_path, torch.bfloat16)))
    assert 0 < error(logits(half)) <= 1.5 * theirs


def test_round_trips_are_exact(tmp_path):
    peft_saved(FORWARD, tmp_path / "theirs", **CASES["both patterns, rslora"])
    first = load_adapter(fast(FORWARD), tmp_path / "theirs")
    save_adapter(first, tmp_path / "ours")
    again = load_adapter(fast(FORWARD), tmp_path / "ours")
    assert again.spec.lora.targets == first.spec.lora.targets
    leaves = zip(tree_leaves(first.adapter), tree_leaves(again.adapter), strict=True)
    assert all(torch.equal(x, y) for x, y in leaves)
    theirs, ours = (hf_logits(peft_read(FORWARD, tmp_path / n)) for n in ("theirs", "ours"))
    assert torch.equal(theirs, ours)


def test_the_folder_has_pefts_form(tmp_path):
    model = lora(fast(FORWARD), r=4, rank_pattern={"q_proj": 2})
    save_adapter(model, tmp_path)
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {f.name for f in tmp_path.iterdir()} == files
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model.spec.name_or_path
    assert (config["target_modules"], config["rank_pattern"]) == (SEVEN, {"q_proj": 2})
    assert config.keys() <= set(PeftConfig().to_dict())


def test_a_card_names_the_base_only_where_the_hub_would_take_the_name(tmp_path):
    for name, named in (("meta-llama/Llama-3.2-1B", True), ("/data/base", False)):
        model = lora(fast(FORWARD), r=4)
        spec = dataclasses.replace(model.spec, name_or_path=name)
        save_adapter(dataclasses.replace(model, spec=spec), tmp_path / str(named))
        card = (tmp_path / str(named) / "README.md").read_text()
        assert ("base_model:" in card.split("---")[1]) is named
        assert "library_name: peft" in card


def test_a_readme_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    model = lora(fast(FORWARD), r=4)
    save_adapter(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_files(call, tmp_path, monkeypatch):
    old, new = (randomised(lora(fast(FORWARD), r=4), seed=s) for s in (1, 2))
    save_adapter(old, tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        with pytest.raises(OSError, match="No space"):
            save_adapter(new, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_broken_adapter_is_not_saved(tmp_path):
    model = lora(fast(FORWARD), r=4)
    nan = tree_map(lambda t: t * float("nan"), model.adapter)
    other = lora(fast(FORWARD), r=5).adapter
    for adapter, message in ((nan, "NaN"), (other, "shape"), (None, "no adapter")):
        with pytest.raises(ValueError, match=message):
            save_adapter(dataclasses.replace(model, adapter=adapter), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_work(tmp_path):
    model = lora(fast(FORWARD), r=4)
    (tmp_path / "file").write_text("x")
    base = Path(model.spec.name_or_path)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", base):
        with pytest.raises(ValueError, match=folder.name):
            save_adapter(model, folder)
    assert not (base / "adapter_config.json").exists()


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    model = lora(fast(FORWARD), r=4)
    # Not chmod: root, who runs most containers, may write all the same.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(PermissionError, match="not writable"):
        save_adapter(model, tmp_path / "new")


def test_a_save_that_fails_half_way_leaves_no_weights_with_other_settings(tmp_path, monkeypatch):
    """Equal shapes, another alpha: the old settings would be read with the new weights."""
    old, new = (randomised(lora(fast(FORWARD), r=4, lora_alpha=alpha)) for alpha in (4, 40))
    old.save_pretrained(tmp_path)
    real = tensors.atomic_write

    def failing(path, write):
        if path.name == "adapter_config.json":
            raise OSError(28, "No space left on device")
        real(path, write)

    monkeypatch.setattr(tensors, "atomic_write", failing)
    with pytest.raises(OSError, match="No space"):
        new.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        load_adapter(fast(FORWARD), tmp_path)
    monkeypatch.setattr(tensors, "atomic_write", real)
    new.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(fast(FORWARD), tmp_path)), logits(new))


def test_push_uploads_the_peft_folder(monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            seen["repo"] = (repo_id, private, exist_ok)
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["files"] = sorted(os.listdir(folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = lora(fast(FORWARD), r=4)
    url = push_to_hub(model, "me/it", token="secret", private=True)
    assert url == "https://huggingface.co/me/it"
    assert seen["token"] == "secret" and seen["repo"] == ("me/it", True, True)
    assert seen["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


# ── merge ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", ["seven names", "both patterns, rslora", "one layer"])
def test_merging_equals_applying(case):
    model = randomised(lora(fast(FORWARD), **CASES[case]))
    merged = merge(model)
    assert merged.adapter is None and merged.spec.lora is None
    assert difference(logits(merged), logits(model), logits(fast(FORWARD))) <= 1e-5


def test_merging_equals_pefts_merge(tmp_path):
    model = randomised(lora(fast(FORWARD), r=4))
    save_adapter(model, tmp_path)
    theirs = peft_read(FORWARD, tmp_path).merge_and_unload().state_dict()
    ours = tensors_from_base(model.spec.config, merge(model).base)
    assert max((ours[k] - theirs[k]).abs().max().item() for k in ours) <= 1e-6


def test_merging_lora_bias_needs_a_bias_in_the_base():
    settings = dict(r=4, lora_alpha=8, lora_bias=True)
    model = randomised(lora(fast("llama_bias"), **settings))
    found, expected = logits(merge(model)), logits(model)
    assert difference(found, expected, logits(fast("llama_bias"))) <= 1e-5
    with pytest.raises(ValueError, match="lora_bias cannot be merged") as refused:
        merge(lora(fast("qwen2"), **settings))
    assert "o_proj" in str(refused.value) and "q_proj" not in str(refused.value)


@pytest.mark.parametrize("family", [FORWARD, "llama_bias"])
def test_merging_dora_equals_applying_it(family):
    model = randomised(lora(fast(family), r=4, use_dora=True))
    assert difference(logits(merge(model)), logits(model), logits(fast(family))) <= 1e-5


def test_merging_copies_only_what_it_touches():
    model = randomised(lora(fast(FORWARD), r=4, target_modules=["v_proj"], layers_to_transform=1))
    before = tensors_from_base(model.spec.config, model.base)
    kept = {k: t.clone() for k, t in before.items()}
    after = tensors_from_base(model.spec.config, merge(model).base)
    new = {k for k in before if after[k].data_ptr() != before[k].data_ptr()}
    assert new == {f"{projection_path(1, 'v_proj')}.weight"}
    assert all(torch.equal(before[k], kept[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_merging_rounds_once(dtype):
    model = fast(FORWARD)
    model = dataclasses.replace(model, base=tree_map(lambda t: t.to(dtype), model.base))
    model = randomised(lora(model, r=4, target_modules=["up_proj"]))
    name = "up_proj"
    a, b = (t.double() for t in model.adapter["layers"][0][name])
    weight = model.base["layers"][0][name]["weight"]
    exact = weight.double() + model.spec.lora.targets[0][0].scaling * (b @ a)
    merged = merge(model).base["layers"][0][name]["weight"]
    assert merged.dtype == dtype
    # Half a unit in the last place, and fp32's own error where the sum is fp32.
    allowed = exact.abs() * (torch.finfo(dtype).eps / 2 + 1e-6 * (dtype != torch.float64)) + 1e-7
    assert ((merged.double() - exact).abs() <= allowed).all()


def test_a_merge_that_would_overflow_is_refused_by_name():
    model = fast(FORWARD)
    model = dataclasses.replace(model, base=tree_map(lambda t: t.half(), model.base))
    model = lora(model, r=4, target_modules=["up_proj", "v_proj"])
    huge = tree_map(lambda t: torch.full_like(t, 1e3), model.adapter)
    with pytest.raises(ValueError, match="Merging would put NaN or infinity") as refused:
        merge(model.with_adapter(huge))
    assert str(refused.value).count("v_proj.weight") == 2


def test_merging_nothing_is_refused():
    with pytest.raises(ValueError, match="no adapter"):
        merge(fast(FORWARD))


# ── Hugging Face folders out ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_folders_load_in_transformers(family, tmp_path):
    model = randomised(lora(fast(family, torch.bfloat16), r=4))
    save_merged(model, tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert hf.dtype == torch.bfloat16
    merged = merge(model)
    state = hf.state_dict()
    for name, tensor in tensors_from_base(merged.spec.config, merged.base).items():
        assert torch.equal(state[name], tensor), name
    found, expected = hf_logits(hf).float(), logits(merged).float()
    base = logits(fast(family, torch.bfloat16)).float()
    # bf16 noise; the weights above are equal to the bit.
    assert difference(found, expected, base) <= (
        2e-2 if any(merged.spec.config.sparse_layers) else 1e-2
    )
    assert (expected - base).abs().max() > 0.1


def test_a_float32_base_is_rounded_to_bfloat16_after_the_merge(tmp_path):
    model = randomised(lora(fast(FORWARD), r=4))
    save_merged(model, tmp_path)
    merged = tensors_from_base(model.spec.config, merge(model).base)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[k], t.to(torch.bfloat16)) for k, t in merged.items())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_hold_what_one_file_holds(tmp_path, monkeypatch):
    model = randomised(lora(fast(FORWARD, torch.bfloat16), r=4))
    save_merged(model, tmp_path / "one")
    monkeypatch.setattr(tensors_out, "SHARD_BYTES", 10_000)
    save_merged(model, tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(s.stat().st_size < 12_000 for s in shards)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {s.name for s in shards}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype="auto")
    assert all(torch.equal(hf.state_dict()[k], t) for k, t in whole.items())


def test_stop_ids_go_into_the_generation_config(tmp_path):
    model = fast(FORWARD)
    config = dataclasses.replace(model.spec.config, eos_token_id=(2, 5))
    spec = dataclasses.replace(model.spec, config=config)
    save_merged(dataclasses.replace(model, spec=spec, adapter=None), tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hf.generation_config.eos_token_id == [2, 5]
    assert hf.generation_config.bos_token_id == 1


def test_the_lora_method_writes_the_peft_folder(tmp_path):
    model = lora(fast(FORWARD), r=4)
    save_merged(model, tmp_path, save_method="lora")
    assert (tmp_path / "adapter_config.json").is_file()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("method", ["merged_16bit", "lora"])
def test_the_tokenizer_goes_along(method, tmp_path):
    words = {"<unk>": 0, "a": 1, "rank": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "in")
    model = lora(fast(FORWARD), r=4)
    tokenizer = Tokenizer.from_folder(tmp_path / "in", config_folder=Path(model.spec.name_or_path))
    save_merged(model, tmp_path / "out", tokenizer, method)
    read = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert read("a rank of")["input_ids"] == [1, 2, 0]


def test_a_method_that_is_none_is_refused(tmp_path):
    model = fast(FORWARD)
    with pytest.raises(ValueError, match="merged_8bit"):
        save_merged(dataclasses.replace(model, adapter=None), tmp_path, save_method="merged_8bit")


def test_a_merged_model_never_lands_on_another(tmp_path):
    model = randomised(lora(fast(FORWARD), r=4))
    base = Path(model.spec.name_or_path)
    before = {f.name: f.read_bytes() for f in base.iterdir()}
    with pytest.raises(ValueError, match="loaded from"):
        save_merged(model, base)
    assert {f.name: f.read_bytes() for f in base.iterdir()} == before
    save_adapter(model, tmp_path)
    # transformers would lay the adapter over the weights that hold it already.
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        save_merged(model, tmp_path)


def test_a_broken_merge_writes_nothing(tmp_path):
    model = lora(fast(FORWARD), r=4)
    nan = tree_map(lambda t: t * float("nan"), model.adapter)
    with pytest.raises(ValueError, match="NaN"):
        save_merged(dataclasses.replace(model, adapter=nan), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_this_is_the_peft_the_rules_were_read_from():
    assert tuple(int(x) for x in peft.__version__.split(".")[:2]) >= (0, 21)
