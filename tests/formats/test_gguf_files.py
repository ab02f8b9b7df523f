"""Contents of GGUF files, and refusals before one is written."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

import fastlora
from fastlora.formats.gguf import model_file, packages, write
from fastlora.formats.gguf.write import DTYPES
from fastlora.formats.mlx import save_mlx_adapter
from oracles.gguf_models import adapted, model_of, tokenizer_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """Rows of 64 fit into the blocks of every type but those of 256."""
    sizes = dict(hidden_size=64, intermediate_size=96)
    return model_of("llama2", tmp_path_factory.mktemp("base"), len(tokenizer), **sizes)


def tensors(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def values(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
        [int(n) for n in reversed(tensor.shape)]
    )


# Largest error of a matrix as a share of its largest value: half a step of each type.
ERRORS = {"f32": 0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 5e-3, "q5_1": 0.04, "q5_0": 0.045}
ERRORS |= {"q4_1": 0.08, "q4_0": 0.09, "mxfp4": 0.22}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_written(dtype, model, tokenizer, tmp_path):
    report = model.save_gguf(tmp_path / "m.gguf", tokenizer, dtype)
    assert report.bytes == (tmp_path / "m.gguf").stat().st_size
    found = tensors(report.path)
    wanted, ternary = DTYPES[dtype][0], dtype in ("tq1_0", "tq2_0")
    up = found["blk.0.ffn_up.weight"]
    # The ternary types have blocks of 256, which rows of 64 do not fill.
    assert up.tensor_type.name == ("F16" if ternary else wanted)
    assert bool(report.notes) == ternary
    assert found["blk.0.ffn_norm.weight"].tensor_type.name == "F32"
    wide = dtype in ("f32", "f16", "bf16")
    assert found["token_embd.weight"].tensor_type.name == (wanted if wide else "Q8_0")
    weight = model.base["layers"][0]["up_proj"]["weight"].numpy()
    error = np.abs(values(up) - weight).max() / np.abs(weight).max()
    assert error <= ERRORS.get(dtype, ERRORS["f16"])
    assert wide or ternary or error > ERRORS["q8_0"] / 20


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_llama_cpp_reads_16_and_8_bits(dtype, model, tokenizer, tmp_path):
    report = model.save_gguf(tmp_path / "m.gguf", tokenizer, dtype, verify=True)
    assert 0 < report.verification.logprob_difference < 0.5
    assert report.verification.equal_ids > 3


def test_k_quants_come_as_a_command_for_a_bfloat16_file(model, tokenizer, tmp_path):
    report = model.save_gguf(tmp_path / "m.gguf", tokenizer, "Q4_K_M")
    assert report.path == tmp_path / "m-bf16.gguf"
    assert report.command == f"llama-quantize {report.path} {tmp_path / 'm.gguf'} Q4_K_M"
    assert tensors(report.path)["blk.1.attn_q.weight"].tensor_type.name == "BF16"
    assert not (tmp_path / "m.gguf").exists()


def test_sums_are_rounded_once(tokenizer, tmp_path):
    """A base in bfloat16 and an adapter in float32: the float32 file holds their exact sum."""
    model_of("qwen3", tmp_path / "base", len(tokenizer))
    model = adapted(fastlora.load(tmp_path / "base", dtype="bfloat16", device="cpu")[0])
    found = tensors(model.save_gguf(tmp_path / "m.gguf", tokenizer, "f32").path)
    weight = model.base["layers"][0]["up_proj"]["weight"].float()
    a, b = model.adapter["layers"][0]["up_proj"]
    expected = torch.addmm(weight, b, a, alpha=model.spec.lora.targets[0][0].scaling)
    assert np.abs(values(found["blk.0.ffn_up.weight"]) - expected.numpy()).max() < 1e-6
    assert found["blk.0.attn_q_norm.weight"].tensor_type.name == "F32"


def test_a_4_bit_base_is_dequantised_and_a_note_says_so(tokenizer, tmp_path):
    model_of("llama2", tmp_path / "base", len(tokenizer), hidden_size=64, intermediate_size=64)
    model, _ = fastlora.load(tmp_path / "base", load_in_4bit=True, device="cpu")
    report = adapted(model).save_gguf(tmp_path / "m.gguf", tokenizer, "f32", verify=True)
    assert "dequantised" in report.notes[0]
    assert report.verification.logprob_difference < 0.01
    assert "4 or 8 bits" in adapted(model).save_gguf_adapter(tmp_path / "a.gguf").notes[0]


def test_one_tensor_is_computed_at_a_time(tokenizer, tmp_path, monkeypatch):
    """Each merged matrix is computed once, when it is written; experts' gate and up together."""
    model = adapted(model_of("mixtral", tmp_path / "base", len(tokenizer)))
    written = []
    encoded = write._encoded
    monkeypatch.setattr(
        write, "_encoded", lambda tensor, kind: written.append(tensor.name) or encoded(tensor, kind)
    )
    made = []
    real = fastlora.adapters.edits.merging.merged_experts
    monkeypatch.setattr(
        "fastlora.adapters.edits.merging.merged_experts",
        lambda *given: made.append(len(written)) or real(*given),
    )
    model.save_gguf(tmp_path / "m.gguf", tokenizer)
    assert len(made) == 4 and made == sorted(set(made)) and made[0] > 1


def test_a_file_that_fails_leaves_the_old_one(model, tokenizer, tmp_path):
    path = tmp_path / "m.gguf"
    model.save_gguf(path, tokenizer, "f16")
    before = path.read_bytes()
    broken = adapted(model)
    broken = broken.with_adapter(tree_map(lambda x: x * torch.nan, broken.adapter))
    with pytest.raises(ValueError, match="NaN or infinity in F16"):
        broken.save_gguf(path, tokenizer, "f16")
    large = dict(model.base["layers"][1], input_layernorm=model.base["norm"])
    large["o_proj"] = {"weight": torch.full((64, 64), 1e6)}
    base = model.base | {"layers": (model.base["layers"][0], large)}
    with pytest.raises(ValueError, match="too large for 16 bits"):
        dataclasses.replace(model, base=base).save_gguf(path, tokenizer, "f16")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


CANNOT = {
    "use_dora": dict(use_dora=True),
    "lora_bias": dict(lora_bias=True),
    "modules_to_save": dict(modules_to_save=["embed_tokens"]),
    "trainable_token_indices": dict(trainable_token_indices=[1, 2]),
    "LoRA on embed_tokens": dict(target_modules=["q_proj", "embed_tokens"]),
}


@pytest.mark.parametrize("what", CANNOT)
def test_adapters_that_the_format_cannot_hold_are_refused(what, model, tokenizer, tmp_path):
    adapter = fastlora.lora(model, r=2, **CANNOT[what])
    with pytest.raises(ValueError, match=what) as refused:
        adapter.save_gguf_adapter(tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
    # The advice can be followed.
    if "Merge first: save_gguf" in str(refused.value):
        adapter.save_gguf(tmp_path / "m.gguf", tokenizer)
    else:
        assert "model.save_pretrained(folder)" in str(refused.value)
        adapter.save_pretrained(tmp_path / "peft")


def test_a_bias_over_a_changed_base_is_refused_with_advice_that_can_be_followed(model, tmp_path):
    """Neither a merged model nor a PEFT folder holds both."""
    changed = fastlora.lora(fastlora.merge(adapted(model)), r=2, lora_bias=True)
    saves = (changed.save_gguf_adapter, changed.save_pretrained, changed.save_pretrained_merged)
    for save in (*saves, lambda path: save_mlx_adapter(changed, path)):
        with pytest.raises(ValueError, match=r"disable\(model\).save_pretrained_merged") as refused:
            save(tmp_path / "refused")
        assert " model.save_pretrained" not in str(refused.value)
    fastlora.disable(changed).save_pretrained_merged(tmp_path / "base")
    over = fastlora.load(tmp_path / "base", device="cpu")[0]
    fastlora.lora(over, r=2, lora_bias=True).save_pretrained(tmp_path / "peft")


def test_other_adapters_that_are_refused(model, tokenizer, tmp_path):
    path = tmp_path / "a.gguf"
    with pytest.raises(ValueError, match="no adapter"):
        model.save_gguf_adapter(path)
    merged = fastlora.merge(adapted(model))
    with pytest.raises(ValueError, match="not the checkpoint's"):
        adapted(merged).save_gguf_adapter(path)
    tied = model_of("smollm2", tmp_path / "base", len(tokenizer))
    head = dict(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="tied to the embedding"):
        fastlora.lora(tied, r=2, **head).save_gguf_adapter(path)
    fastlora.lora(tied, r=2, **head).save_gguf(tmp_path / "m.gguf", tokenizer)
    biased = model_of("qwen2", tmp_path / "biased", len(tokenizer))
    with pytest.raises(ValueError, match="bias='all'"):
        fastlora.lora(biased, r=2, bias="all").save_gguf_adapter(path)
    in_q = dict(lora_bias=True, target_modules=["q_proj"])  # the base has a bias there
    with pytest.raises(ValueError, match=r"lora_bias: [\s\S]*Merge first"):
        fastlora.lora(biased, r=2, **in_q).save_gguf_adapter(path)
    fastlora.lora(biased, r=2, **in_q).save_gguf(tmp_path / "m.gguf", tokenizer)
    assert not path.exists()


def test_bad_arguments_are_listed(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"dtype='int3'[\s\S]*pre=''"):
        model.save_gguf(tmp_path / "m.gguf", tokenizer, "int3", pre="")
    with pytest.raises(ValueError, match=r"pre='gtp-2': expected .*such as gpt-2"):
        model.save_gguf(tmp_path / "m.gguf", tokenizer, pre="gtp-2")
    with pytest.raises(ValueError, match=r"pre='foo': expected .*such as llama-bpe"):
        model.save_ollama(tmp_path / "ollama", tokenizer, pre="foo")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is a folder"):
        model.save_gguf(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="is a file"):
        (tmp_path / "file").touch()
        model.save_gguf(tmp_path / "file" / "m.gguf", tokenizer)
    longer = tokenizer.with_tokens(["<new>"])
    with pytest.raises(fastlora.CheckpointError, match="add_tokens makes room"):
        model.save_gguf(tmp_path / "m.gguf", longer)


def test_only_a_gguf_file_is_replaced(model, tokenizer, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    for save in (
        lambda: model.save_gguf(path, tokenizer),
        lambda: model.save_gguf(path, tokenizer, "q4_k_m"),  # by the command in its report
        lambda: adapted(model).save_gguf_adapter(path),
    ):
        with pytest.raises(ValueError, match=r"not a GGUF file; .* such as model\.gguf"):
            save()
    assert path.read_bytes() == b"weights" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "empty").touch()
    for _ in range(2):
        model.save_gguf(tmp_path / "empty", tokenizer)


def test_a_file_that_llama_cpp_cannot_load_is_not_kept(model, tokenizer, tmp_path, monkeypatch):
    model.save_gguf(path := tmp_path / "m.gguf", tokenizer)
    before = path.read_bytes()
    real = model_file.vocabulary_metadata
    unread = {"tokenizer.ggml.pre": "no such name"}
    monkeypatch.setattr(
        model_file,
        "vocabulary_metadata",
        lambda *given: (v := real(*given))._replace(metadata=v.metadata | unread),
    )
    with pytest.raises(RuntimeError, match=r"llama\.cpp cannot load m\.gguf"):
        model.save_gguf(path, tokenizer, "f32", verify=True)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("package", ["gguf", "xllamacpp"])
def test_a_missing_package_is_named(package, model, tokenizer, tmp_path, monkeypatch):
    def refuse(name):
        if name == package:
            raise ImportError(f"No module named {name}")

    monkeypatch.setattr(packages, "import_module", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[gguf\]'"):
        model.save_gguf(tmp_path / "m.gguf", tokenizer, verify=True)
    assert not list(tmp_path.iterdir())
