"""load() and read_base(), against checkpoints that transformers wrote."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from fastlora.checkpoints import hub
from fastlora.checkpoints.reading import read_base
from fastlora.checkpoints.tensors import INDEX, WEIGHTS
from fastlora.errors import CheckpointError
from fastlora.loading import load
from fastlora.model import Model
from fastlora.models.config_json import config_to_json
from fastlora.models.names import EMBED_TOKENS, LM_HEAD, tensors_from_base
from oracles.checkpoints import FAMILIES, make_checkpoint, mapped_from, respell

ROOT = str(Path(__file__).parents[1])


def assert_holds(folder: Path, expected: dict[str, torch.Tensor], **how) -> None:
    """read_base gives exactly these tensors, bit for bit."""
    tensors = tensors_from_base(*read_base(folder, **how))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


IDS = torch.arange(9)[None]


@torch.no_grad()
def assert_computes(model: Model, oracle: torch.nn.Module) -> None:
    """The same logits, to float32's rounding (T32 of peft-format.md)."""
    theirs = oracle(IDS).logits
    tolerance = 1e-5 * max(1, theirs.abs().max().item())
    torch.testing.assert_close(model(IDS), theirs, rtol=0, atol=tolerance)


def weights(model) -> dict[str, torch.Tensor]:
    """transformers' state dict, a tied head once."""
    state = dict(model.state_dict())
    if model.lm_head.weight is model.model.embed_tokens.weight:
        del state[LM_HEAD]
    return state


def edit(folder: Path, change) -> None:
    """Rewrite model.safetensors; `change` edits the dict in place."""
    tensors = {k: v.clone() for k, v in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(path: Path, **changed) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.fixture
def folder(tmp_path) -> Path:
    make_checkpoint("llama2", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tied(tmp_path) -> Path:
    make_checkpoint("llama3.2", tmp_path / "tied")
    return tmp_path / "tied"


# ── weights ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_equal_those_in_the_file(family, dtype, tmp_path):
    model = make_checkpoint(family, tmp_path, dtype)
    assert_holds(tmp_path, weights(model))
    respell(tmp_path)
    assert_holds(tmp_path, weights(model))


def test_shards_hold_the_same_as_one_file(tmp_path):
    model = make_checkpoint("llama2", tmp_path / "one")
    make_checkpoint("llama2", tmp_path / "many", max_shard_size="20kB")
    assert (tmp_path / "many" / INDEX).is_file()
    assert not (tmp_path / "many" / WEIGHTS).exists()
    assert_holds(tmp_path / "many", weights(model))


def test_a_missing_shard_is_named(tmp_path):
    make_checkpoint("llama2", tmp_path, max_shard_size="20kB")
    gone = max(tmp_path.glob("model-*.safetensors"))
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        read_base(tmp_path)


def test_a_base_models_keys_and_stale_frequencies_load(folder):
    expected = weights(AutoModelForCausalLM.from_pretrained(folder))

    def strip(tensors):
        for name in [n for n in tensors if n.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit(folder, strip)
    assert_holds(folder, expected)


def test_on_the_cpu_nothing_is_copied(folder):
    _, base = read_base(folder)
    assert {mapped_from(leaf) for leaf in tree_leaves(base)} == {str(folder / WEIGHTS)}


# ── dtype ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float64", "float16", torch.bfloat16], ids=str)
def test_a_given_dtype_converts_and_is_recorded(folder, dtype):
    model, _ = load(folder, dtype=dtype, device="cpu")
    name = str(dtype).removeprefix("torch.")
    assert {leaf.dtype for leaf in tree_leaves(model.base)} == {getattr(torch, name)}
    assert model.spec.config.dtype == name
    assert config_to_json(model.spec.config)["dtype"] == name


def test_the_configs_dtype_overrides_the_files_as_in_transformers(folder):
    edit_json(folder / "config.json", dtype="bfloat16")
    assert_holds(folder, weights(AutoModelForCausalLM.from_pretrained(folder)))
    assert read_base(folder)[0].dtype == "bfloat16"


def test_without_a_dtype_in_the_config_the_files_dtype_is_kept(tmp_path):
    make_checkpoint("llama2", tmp_path, torch.float16)
    edit_json(tmp_path / "config.json", dtype=None)
    config, base = read_base(tmp_path)
    assert config.dtype == "float16"
    assert {leaf.dtype for leaf in tree_leaves(base)} == {torch.float16}


# ── a tied head ───────────────────────────────────────────────────────────────────────────


def store_head(folder: Path, scale: float) -> None:
    edit(folder, lambda t: t.update({LM_HEAD: scale * t[EMBED_TOKENS]}))


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_stored_head_is_used_if_it_differs_as_in_transformers(tied, scale):
    store_head(tied, scale)
    config, base = read_base(tied)
    assert config.tie_word_embeddings == (scale == 1.0) == ("lm_head" not in base)
    assert config_to_json(config)["tie_word_embeddings"] == (scale == 1.0)
    assert_computes(load(tied, device="cpu")[0], AutoModelForCausalLM.from_pretrained(tied))


def test_a_tied_head_alone_is_the_embedding(tied):
    expected = weights(AutoModelForCausalLM.from_pretrained(tied))
    edit(tied, lambda t: t.update({LM_HEAD: t.pop(EMBED_TOKENS)}))
    assert_holds(tied, expected)


def test_an_untied_model_without_a_head_is_refused(folder):
    edit(folder, lambda t: t.pop(LM_HEAD))
    with pytest.raises(CheckpointError, match=r"missing +lm_head\.weight \(96, 32\)"):
        read_base(folder)


# ── refusals ──────────────────────────────────────────────────────────────────────────────


def test_all_wrong_tensors_are_named_together(folder):
    up = "model.layers.0.mlp.up_proj.weight"

    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors[up] = tensors[up][:3]
        tensors["model.layers.1.mlp.down_proj.bias"] = torch.ones(32)
        tensors[EMBED_TOKENS] = tensors[EMBED_TOKENS].to(torch.int32)

    edit(folder, spoil)
    with pytest.raises(CheckpointError) as refused:
        read_base(folder)
    text = str(refused.value)
    assert str(folder) in text
    for problem in (
        r"missing +model\.norm\.weight \(32,\)",
        rf"shape +{up} in {WEIGHTS}: file has \(3, 32\), model needs \(56, 32\)",
        r"unexpected +model\.layers\.1\.mlp\.down_proj\.bias",
        rf"dtype +{EMBED_TOKENS} in {WEIGHTS}: file has I32",
    ):
        assert re.search(problem, text), problem


def test_a_truncated_file_is_refused_in_a_moment(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    start = time.process_time()
    with pytest.raises(CheckpointError, match=WEIGHTS):
        read_base(folder)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(model_type="gpt2"), "gpt2"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(rope_parameters={"rope_type": "longrope"}), "short_factor is missing"),
        (dict(quantization_config={"quant_method": "awq"}), "awq"),
        (dict(num_attention_heads="4"), "num_attention_heads"),
    ],
)
def test_an_unsupported_config_is_refused_with_file_and_field(folder, changed, words):
    edit_json(folder / "config.json", **changed)
    with pytest.raises(CheckpointError, match=rf"config\.json(.|\n)*{words}"):
        read_base(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_json_is_named(folder, name):
    (folder / name).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=re.escape(name)):
        read_base(folder)


def test_an_empty_folder_is_refused_with_the_expected_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json.*adapter_config\.json"):
        load(tmp_path)


# ── load ──────────────────────────────────────────────────────────────────────────────────


def test_load_describes_what_it_loaded(folder):
    edit_json(folder / "generation_config.json", eos_token_id=[2, 7])
    model, tokenizer = load(folder, device="cpu", max_seq_length=17)
    assert tokenizer is None
    assert model.adapter is None
    assert model.spec.name_or_path == str(folder)
    assert model.spec.max_seq_length == 17
    assert model.spec.config.eos_token_id == (2, 7)


def test_max_seq_length_is_the_configs_by_default(folder):
    assert load(folder, device="cpu")[0].spec.max_seq_length == 128


def test_rope_scaling_reaches_the_model(folder):
    scaling = {"rope_type": "linear", "factor": 2.0}
    model, _ = load(folder, device="cpu", rope_scaling=scaling)
    edit_json(folder / "config.json", rope_parameters={**scaling, "rope_theta": 10000.0})
    assert_computes(model, AutoModelForCausalLM.from_pretrained(folder))


def test_all_wrong_arguments_are_listed_at_once():
    with pytest.raises(ValueError) as refused:
        load("./nowhere", max_seq_length=0, dtype="int8", device="cuda:99")
    for name in ("max_seq_length=0", "dtype='int8'", "device='cuda:99'"):
        assert name in str(refused.value)


@pytest.mark.parametrize("device", ["tpu", "meta", "mps", "cuda:99"])
def test_a_device_that_this_machine_lacks_is_refused(device, folder):
    with pytest.raises(ValueError, match=device):
        load(folder, device=device)


@pytest.mark.parametrize("dtype", [torch.int8, "float8", "torch.float32", ""])
def test_a_dtype_that_weights_cannot_have_is_refused(dtype, folder):
    with pytest.raises(ValueError, match="dtype="):
        load(folder, dtype=dtype)


def test_the_name_demo_means_the_shipped_demo(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "DEMO", folder)
    monkeypatch.chdir(tmp_path)
    make_checkpoint("qwen3", tmp_path / "demo")
    assert load("demo", device="cpu")[0].spec.config.model_type == "llama"
    assert load("./demo", device="cpu")[0].spec.config.model_type == "qwen3"


def test_loading_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    load(folder, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


# ── adapters ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapters_folder_loads_on_its_base(folder, adapter):
    from peft import PeftModel

    model, _ = load(adapter, device="cpu")
    assert model.spec.name_or_path == str(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    plain = base(IDS).logits
    theirs = PeftModel.from_pretrained(base, adapter).eval()
    assert (theirs(IDS).logits - plain).abs().max() > 1e-2, "the adapter must matter"
    assert_computes(model, theirs)


def test_a_relative_base_name_starts_from_the_working_directory(folder, adapter, monkeypatch):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="model")
    monkeypatch.chdir(folder.parent)
    assert load(adapter, device="cpu")[0].spec.name_or_path == "model"


@pytest.mark.parametrize("base", [None, "", 7])
def test_an_adapter_that_names_no_base_is_refused(adapter, base):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*base_model_name_or_path"):
        load(adapter, device="cpu")


def test_a_models_folder_with_an_adapter_config_is_a_model(folder, adapter):
    shutil.copy(adapter / "adapter_config.json", folder)
    assert load(folder, device="cpu")[0].adapter is None


# ── memory ────────────────────────────────────────────────────────────────────────────────


def test_host_memory_stays_under_the_largest_tensor(tmp_path):
    """64 MB of weights, mapped: anonymous memory grows by less than the largest tensor (16 MB).

    scripts/bench/measure_load.py shows the same for 2.5 GB.
    """
    big = dict(vocab_size=16384, hidden_size=256, intermediate_size=4096, num_hidden_layers=8)
    make_checkpoint("llama2", tmp_path, config=big)
    code = (
        "import re, sys; from pathlib import Path\n"
        "from fastlora.checkpoints.reading import read_base\n"
        "def anonymous():\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', status)[1]) * 1024\n"
        "before = anonymous(); config, base = read_base(Path(sys.argv[1]))\n"
        "print(sum(layer['up_proj']['weight'].sum() for layer in base['layers']).item())\n"
        "print(anonymous() - before)"
    )
    env = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) > 64e6
    assert int(result.stdout.split()[-1]) < 16e6
