"""The files of a finished run: run.json, the tokenizer and a filled model card."""

import dataclasses
import json
import re
from importlib import metadata

import peft
import pytest
import torch
import transformers

import fastlora
from fastlora.training.loop import train
from fastlora.training.model_card import _shell, may_replace_card, vllm_problems
from fastlora.training.run_record import source_name
from oracles.training_runs import QUIET, ROWS, long_run, settings


@pytest.fixture(scope="module")
def run(model, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    rows = out / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = dict(
        max_steps=3, eval_data=ROWS[:3], learning_rates={"B": 1e-3}, seed=5,
        lr_scheduler=constant, optimizer=torch.optim.NAdam,
    )  # fmt: skip
    trained, history = train(model, tokenizer, rows, output_dir=out / "adapter", **given, **QUIET)
    return out / "adapter", trained, history


def constant(index: int, steps: int) -> float:
    return 1.0


def test_run_json_has_every_setting_and_the_result(run):
    folder, trained, history = run
    record = json.loads((folder / "run.json").read_text())
    names = {name for name in dir(settings()) if not name.startswith("_")}
    assert record["settings"].keys() == names
    assert record["settings"]["seed"] == 5
    assert record["settings"]["learning_rates"] == {"B": 1e-3}
    assert "constant" in record["settings"]["lr_scheduler"]
    assert "NAdam" in record["settings"]["optimizer"]
    assert record["versions"]["torch"] == metadata.version("torch")
    assert record["versions"]["fastlora"] == fastlora.__version__
    assert record["device"]["type"] == "cpu"
    assert record["device"]["threads"] == torch.get_num_threads()
    assert record["data"]["name"] == "rows.jsonl"
    saved = json.loads((folder / "training_run.json").read_text())["settings"]
    assert record["data"]["fingerprint"] == saved["hash of the training data"]
    assert record["eval_data"]["fingerprint"] != record["data"]["fingerprint"]
    result = record["result"]
    assert result["last_loss"] == history.losses[-1] and result["steps"] == 3
    assert result["best_step"] == 3 and result["best_eval_loss"] == history.eval_losses[-1]
    assert record["lora"]["r"] == trained.spec.lora.r


def test_transformers_reads_the_tokenizer_and_peft_the_adapter(run, folder, tokenizer):
    out, trained, _ = run
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "def f(x):"}]
    assert theirs("def f(x): return x")["input_ids"] == tokenizer.encode("def f(x): return x")
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ours = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == ours
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(base, str(out)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(input_ids=ids).logits, trained(ids), rtol=0, atol=1e-5)
    again, its_tokenizer = fastlora.load(out, device="cpu")
    assert torch.equal(again(ids), trained(ids))
    assert its_tokenizer is not None and its_tokenizer.files == tokenizer.files


def test_the_card_is_filled_and_names_no_path(run, folder):
    out, _, history = run
    card = (out / "README.md").read_text()
    for word in ("rows.jsonl", f"{history.losses[-1]:.4f}", "seed=5", "fingerprint", "vllm serve",
                 "convert_lora_to_gguf", "PeftModel", "library_name: peft", "torch 2"):  # fmt: skip
        assert word in card, word
    assert str(folder) not in card.split("## Training")[1]
    assert not re.search(r"\[More Information Needed\]|None", card.split("## Training")[1])


def test_a_card_that_the_user_wrote_is_kept(model, tokenizer, tmp_path):
    given = dict(output_dir=tmp_path, max_steps=1, **QUIET)
    train(model, tokenizer, ROWS, **given)
    assert "## Training" in (tmp_path / "README.md").read_text()
    train(model, tokenizer, ROWS, **given)
    written = (tmp_path / "README.md").read_text()
    assert written.count("## Training") == 1
    edited = written.replace("## Loading", "It answers in rhyme.\n\n## Loading")
    for text in ("# Mine\n", edited, written + "\n", ""):
        (tmp_path / "README.md").write_text(text)
        train(model, tokenizer, ROWS, **given)
        assert (tmp_path / "README.md").read_text() == text
        assert not may_replace_card(text, model)
    assert may_replace_card(written, model)


def test_the_card_says_when_vllm_will_not_load_the_adapter(base, tokenizer, tmp_path):
    for name, more, word in (
        ("a", dict(use_dora=True), "DoRA"),
        ("b", dict(modules_to_save=["lm_head"]), "modules_to_save"),
        ("c", dict(trainable_token_indices=[5]), "trained tokens"),
        ("d", dict(lora_bias=True), "biases"),
    ):
        model = fastlora.lora(base, r=2, target_modules=["q_proj"], **more)
        assert vllm_problems(model.spec.lora) == [word]
        train(model, tokenizer, ROWS, output_dir=tmp_path / name, max_steps=1, **QUIET)
        card = (tmp_path / name / "README.md").read_text()
        assert f"vLLM does not load this adapter: it has {word}" in card
        assert "vllm serve" not in card
        # The base has no bias that lora_bias could be merged into.
        assert ("Merge it into the base" in card) == (name != "d")


def test_the_card_names_a_way_to_llama_cpp_that_keeps_the_scaling(base, pair):
    """llama.cpp's script writes one alpha. It reads Granite 4's MLP too (conversion/granite.py)."""
    script, ours = "convert_lora_to_gguf.py", "export.py this-folder adapter.gguf"
    for more, words in (
        (dict(), (script,)),
        (dict(use_rslora=True), (ours,)),
        (dict(alpha_pattern={"q_proj": 3}), (ours,)),
        (dict(rank_pattern={"q_proj": 1}), (script,)),
        (dict(use_dora=True), ()),
    ):
        text = _shell("base", fastlora.lora(base, r=2, target_modules=["q_proj", "o_proj"], **more))
        assert [word in text for word in (script, ours)] == [
            word in words for word in (script, ours)
        ]
    granite4 = fastlora.lora(pair("granite4").model, r=2, target_modules=["input_linear"])
    assert script in _shell("base", granite4)
    capped = pair("gemma2").model
    config = dataclasses.replace(capped.spec.config, attention_cap=None)
    capped = dataclasses.replace(capped, spec=dataclasses.replace(capped.spec, config=config))
    assert "llama.cpp" not in _shell("base", fastlora.lora(capped, r=2))


def test_the_card_names_the_step_of_the_best_weights(dropping, tokenizer, tmp_path):
    long_run(dropping, tokenizer, tmp_path, keep_best=True)
    step = json.loads((tmp_path / "run.json").read_text())["result"]["best_step"]
    assert f"after step {step} (keep_best=True)" in (tmp_path / "README.md").read_text()


def test_sources_are_named_without_their_folders():
    assert source_name("/home/me/rows.jsonl") == "rows.jsonl"
    assert source_name(ROWS) == "list"
    assert source_name({"/a/x.jsonl": 0.7, "y.csv": 0.3}) == "x.jsonl x 0.7, y.csv x 0.3"


def test_the_card_names_the_rank_that_is_saved(base, tokenizer, tmp_path):
    """PiSSA's initial offset is folded into the adapter, which doubles its rank."""
    train(fastlora.lora(base, r=8, init_lora_weights="pissa"), tokenizer, ROWS, output_dir=tmp_path,
          max_steps=1, **QUIET)  # fmt: skip
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 16
    card = (tmp_path / "README.md").read_text()
    assert "Rank 16, alpha" in card and "--max-lora-rank 16" in card


@pytest.mark.parametrize(
    ("how", "kind", "line"),
    [
        (dict(load_in_4bit=True), "4 bits", 'load("this-folder", load_in_4bit=True)'),
        (dict(base_precision="fp8"), "fp8", 'load("this-folder", base_precision="fp8")'),
    ],
)
def test_a_quantised_base_is_on_record(how, kind, line, tmp_path):
    base, tokenizer = fastlora.load("demo", max_seq_length=64, device="cpu", **how)
    given = dict(output_dir=tmp_path, max_steps=1, save_every=1, **QUIET)
    train(fastlora.lora(base, r=2), tokenizer, ROWS, **given)
    assert json.loads((tmp_path / "run.json").read_text())["model"]["quantized_to"] == kind
    card = (tmp_path / "README.md").read_text()
    assert line in card and f"| base quantized to | {kind} |" in card
    dense, _ = fastlora.load("demo", max_seq_length=64, device="cpu")
    with pytest.raises(ValueError, match=f"base quantized to: '{kind}' there, None now"):
        train(fastlora.lora(dense, r=2), tokenizer, ROWS, **given, resume=True)
