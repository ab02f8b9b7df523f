"""Folders for Ollama: the Modelfile's lines, and chat templates in Go."""

import re

import pytest
import torch
from torch.utils._pytree import tree_map

import fastlora
from fastlora.formats.gguf.go_template import go_template
from fastlora.text.tokenizer import Tokenizer
from oracles.gguf_models import adapted, model_of
from oracles.peft_side import with_random_adapter
from oracles.tokenizer_folders import CHATML_MARKED, THINKING, llama2, llama3, qwen

CHATS = [
    ["user"],
    ["system", "user"],
    ["user", "assistant", "user"],
    ["system", "user", "assistant", "user", "assistant", "user"],
]


def run_go(template: str, chat) -> str:
    """The text of a template of the shape that go_template writes, as Go's text/template has it."""
    system = any(m["role"] == "system" for m in chat)
    template = re.sub(
        r"{{ if not \.System }}(.*?){{ end }}",
        lambda m: "" if system else m[1],
        template,
        flags=re.S,
    )
    before, loop, after = re.fullmatch(
        r"(.*?){{ range \.Messages }}(.*){{ end }}{{ end }}(.*)", template, flags=re.S
    ).groups()
    cases = dict(re.findall(r'if eq \.Role "(\w+)" }}(.*?)(?={{ else |\Z)', loop, flags=re.S))
    parts = [cases[m["role"]].replace("{{ .Content }}", m["content"]) for m in chat]
    return before + "".join(parts) + after


def tokenizer_at(folder) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize(
    "write",
    [llama3, qwen, lambda f: qwen(f, CHATML_MARKED), lambda f: qwen(f, THINKING)],
    ids=["llama3", "chatml", "marked", "thinking"],
)
@pytest.mark.parametrize("roles", CHATS, ids=len)
def test_go_templates_give_the_text_of_the_chat_template(write, roles, tmp_path):
    tokenizer = tokenizer_at(write(tmp_path))
    chat = [{"role": role, "content": f"({i})"} for i, role in enumerate(roles)]
    template = go_template(tokenizer)
    assert template is not None
    found = tokenizer.encode(run_go(template, chat))  # as Ollama: with BOS if it adds one
    assert found == tokenizer.apply_chat_template(chat, add_generation_prompt=True)


# It numbers the messages.
COUNTED = "{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [COUNTED, None])
def test_other_chat_templates_have_no_go_template(template, tmp_path):
    tokenizer = tokenizer_at(qwen(tmp_path, template))
    assert go_template(tokenizer) is None


def test_a_folder_has_base_adapter_and_modelfile(tmp_path):
    tokenizer = tokenizer_at(llama3(tmp_path / "tokenizer"))
    model = model_of("llama2", tmp_path / "base", len(tokenizer))
    report = adapted(model).save_ollama(tmp_path / "out", tokenizer, "f32")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["Modelfile", "adapter.gguf", "model.gguf"]
    assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    lines = report.path.read_text().splitlines()
    assert lines[:2] == ["FROM ./model.gguf", "ADAPTER ./adapter.gguf"]
    assert lines[2].startswith('TEMPLATE """{{ range .Messages }}')
    # The tokenizer's, generation_config.json's, and the model's id 2.
    stops = ["<|eot_id|>", "<|end_of_text|>", tokenizer.decode([2])]
    assert [x for x in lines if x.startswith("PARA")] == [f'PARAMETER stop "{x}"' for x in stops]
    base = model.save_gguf(tmp_path / "base.gguf", tokenizer, "f32").path.read_bytes()
    assert (tmp_path / "out" / "model.gguf").read_bytes() == base


def test_an_adapter_that_the_format_cannot_hold_is_merged(tmp_path):
    tokenizer = tokenizer_at(llama2(tmp_path / "tokenizer", chat_template=COUNTED))
    model = model_of("llama2", tmp_path / "base", len(tokenizer))
    adapted(model).save_ollama(tmp_path / "out", tokenizer, "f32")
    model = with_random_adapter(fastlora.lora(model, r=2, use_dora=True))
    report = model.save_ollama(tmp_path / "out", tokenizer, "f32")
    assert report.adapter is None
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    text = report.path.read_text()
    assert "ADAPTER" not in text and "TEMPLATE" not in text
    assert "no TEMPLATE" in report.model.notes[-1]
    merged = model.save_gguf(tmp_path / "m.gguf", tokenizer, "f32")
    assert (tmp_path / "out" / "model.gguf").read_bytes() == merged.path.read_bytes()


def test_a_k_quant_is_left_to_ollama_and_a_note_says_so(tmp_path):
    tokenizer = tokenizer_at(llama3(tmp_path / "tokenizer"))
    model = model_of("llama2", tmp_path / "base", len(tokenizer))
    report = model.save_ollama(tmp_path / "out", tokenizer, "Q4_K_M")
    assert report.path.read_text().startswith("FROM ./model-bf16.gguf\n")
    (note,) = [x for x in report.model.notes if "ollama create" in x]
    assert note.startswith("model-bf16.gguf holds bfloat16, not q4_k_m.")


def test_a_refused_adapter_leaves_all_files(tmp_path):
    tokenizer = tokenizer_at(llama3(tmp_path / "tokenizer"))
    model, out = adapted(model_of("llama2", tmp_path / "base", len(tokenizer))), tmp_path / "out"
    broken = model.with_adapter(tree_map(lambda x: x * torch.nan, model.adapter))
    with pytest.raises(ValueError, match=r"NaN or infinity in:\s+blk\.0"):
        broken.save_ollama(out, tokenizer, "f32")
    assert not out.exists()
    model.save_ollama(out, tokenizer, "f32")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match="NaN or infinity"):
        broken.save_ollama(out, tokenizer, "f16")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_files_that_cannot_be_replaced_are_refused_first(tmp_path):
    tokenizer = tokenizer_at(llama3(tmp_path / "tokenizer"))
    base = model_of("llama2", tmp_path / "base", len(tokenizer))
    merged = fastlora.lora(base, r=2, use_dora=True)
    for name, a_folder in (("adapter.gguf", False), ("adapter.gguf", True), ("Modelfile", True)):
        path = tmp_path / f"{name} {a_folder}" / name
        path.mkdir(parents=True) if a_folder else path.parent.mkdir()
        a_folder or path.write_text("mine")
        for model in (adapted(base), merged):
            with pytest.raises(ValueError, match="is a folder" if a_folder else "not a GGUF file"):
                model.save_ollama(path.parent, tokenizer, "f32")
        assert [p.name for p in path.parent.iterdir()] == [name]
