"""Families: a new one is one record and one entry in the registry; nothing else names a family."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora.models.config_json import config_from_json
from fastlora.models.families.llama import LLAMA
from fastlora.models.families.registry import FAMILIES, tokenizer_class_of
from oracles.checkpoints import make_checkpoint
from oracles.trees import token_ids

PACKAGE = Path(fastlora.__file__).parent

# Llama with one deviation in its defaults, and other default targets of adapters.
TOY = replace(
    LLAMA,
    name="toy",
    defaults={**LLAMA.defaults, "rms_norm_eps": 1e-2},
    default_targets=("o_proj",),
)


@pytest.fixture
def toy_folder(tmp_path, monkeypatch) -> Path:
    """A checkpoint of the toy family, whose config.json leaves the epsilon to its family."""
    monkeypatch.setitem(FAMILIES, TOY.name, TOY)
    folder = tmp_path / "toy"
    make_checkpoint("llama2", folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    del raw["rms_norm_eps"]
    path.write_text(json.dumps(raw | {"model_type": "toy"}))
    return folder


def test_a_family_of_one_record_is_loaded_adapted_and_saved(toy_folder, tmp_path):
    model, _ = fastlora.load(toy_folder, device="cpu")
    assert model.spec.config.rms_norm_eps == 1e-2 and model.spec.config.model_type == "toy"
    ids = token_ids(2, 7, vocab_size=96)

    path = toy_folder / "config.json"
    as_llama = json.loads(path.read_text()) | {"model_type": "llama"}
    llama_folder = tmp_path / "llama"
    llama_folder.mkdir()
    for file in toy_folder.iterdir():
        (llama_folder / file.name).write_bytes(file.read_bytes())
    (llama_folder / "config.json").write_text(json.dumps(as_llama | {"rms_norm_eps": 1e-2}))
    assert torch.equal(model(ids), fastlora.load(llama_folder, device="cpu")[0](ids))

    adapted = fastlora.lora(model, r=2, target_modules=None)
    assert {t.name for targets in adapted.spec.lora.targets for t in targets} == {"o_proj"}
    layers = adapted.adapter["layers"]
    trained = tuple({n: x._replace(b=x.b + 0.1) for n, x in layer.items()} for layer in layers)
    adapted = adapted.with_adapter({"layers": trained})
    adapted.save_pretrained(tmp_path / "adapter")
    again = fastlora.load_adapter(model, tmp_path / "adapter")
    assert torch.equal(again(ids), adapted(ids)) and not torch.equal(adapted(ids), model(ids))

    adapted.save_pretrained_merged(tmp_path / "merged")
    merged, _ = fastlora.load(tmp_path / "merged", device="cpu", dtype="float32")
    assert merged.spec.config.model_type == "toy" and merged.spec.config.rms_norm_eps == 1e-2
    difference = (merged(ids) - adapted(ids)).abs().max()  # the file is in bfloat16
    assert difference <= 0.05 * adapted(ids).abs().max()


def test_without_its_entry_a_family_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="model_type is 'toy', but fastlora knows llama, mistral"):
        config_from_json({"model_type": "toy"})


def test_every_record_has_the_name_under_which_it_is_registered():
    assert all(family.name == name for name, family in FAMILIES.items())


@pytest.mark.parametrize(
    ("model_type", "name", "ignores_declared"),
    [
        ("llama", None, False),
        ("mistral", "PreTrainedTokenizerFast", True),
        ("mixtral", "PreTrainedTokenizerFast", True),
        ("qwen2", "Qwen2Tokenizer", True),
        ("qwen3", "Qwen2Tokenizer", False),
        ("qwen3_moe", "Qwen2Tokenizer", False),
        ("qwen2_moe", "Qwen2Tokenizer", False),  # its models are not run
        ("smollm3", None, False),
        ("ministral", "PreTrainedTokenizerFast", True),
        ("internlm3", "PreTrainedTokenizerFast", True),
        ("seed_oss", None, False),
        ("cwm", None, False),
        ("ernie4_5", "PreTrainedTokenizerFast", True),
        ("helium", None, False),
        ("phi3", "PreTrainedTokenizerFast", True),
        ("granite", "PreTrainedTokenizerFast", True),
        ("granitemoehybrid", "PreTrainedTokenizerFast", True),
        ("gpt2", None, False),
        (None, None, False),
        (["llama"], None, False),
    ],
)
def test_tokenizer_classes_are_those_that_transformers_builds(model_type, name, ignores_declared):
    assert tokenizer_class_of(model_type) == (name, ignores_declared)


def names_of_families(path: Path) -> list[str]:
    """Lines that look at model_type in a comparison, or that name a family in a string."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare) and "model_type" in ast.unparse(node):
            found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}")
        if isinstance(node, ast.Constant) and node.value in FAMILIES:
            found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.value!r}")
    return found


def test_no_file_outside_of_the_families_asks_for_a_family():
    """Files ask the family's record. Files of models/config*.py read model_type from JSON. GGUF's
    names of tokenizers are those of some families."""
    families = PACKAGE / "models" / "families"
    files = [
        path
        for path in PACKAGE.rglob("*.py")
        if families not in path.parents and not path.match("models/config*.py")
    ]
    assert len(files) > 100
    tokenizers = {"formats/gguf/pre_tokenizers.py", "formats/gguf/sentencepiece.py"}
    files = [path for path in files if path.relative_to(PACKAGE).as_posix() not in tokenizers]
    wrong = [line for path in files for line in names_of_families(path)]
    assert not wrong, "ask families.registry.family_of(config):\n" + "\n".join(wrong)


def test_a_comparison_with_a_family_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    path = tmp_path / "new.py"
    path.write_text('def f(config):\n    return config.model_type == "other" or "qwen2"\n')
    assert names_of_families(path) == [
        "new.py:2 config.model_type == 'other'",
        "new.py:2 'qwen2'",
    ]
