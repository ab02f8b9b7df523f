"""scripts/finetune.py: its options, its exit codes, and runs that are repeated."""

import dataclasses
import inspect
import json
import shutil
import sys
import tomllib
import warnings

import finetune
import pytest
from finetuning import options
from finetuning.ending import exit_code
from finetuning.toml import to_toml

import fastlora
from fastlora.checkpoints.hub import DEMO
from fastlora.data import lanes, streams
from fastlora.training.logging import extras
from fastlora.training.loop import train
from fastlora.training.settings import Settings
from oracles.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[str, ...]:
    """Options of a run of two steps of a random base, two layers of 32, with the demo's tokens."""
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint("llama2", folder, config=dict(vocab_size=4096))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder)
    options = {"--model": folder, "--max-seq-length": 64, "--max-steps": 2, "--batch-size": 2}
    return ("--no-progress", *(str(x) for pair in options.items() for x in pair))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join((DEMO / "train.jsonl").read_text().splitlines(keepends=True)[:4]))
    return path


def call(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        finetune.main()
    return end.value.code


@pytest.fixture
def first(rows, quick, tmp_path, monkeypatch):
    """The folder of a run of two steps."""
    folder = tmp_path / "first"
    given = ("--data", rows, "--eval-data", rows, "--output", folder, "--r", 2)
    assert call(monkeypatch, *given, *quick) == 0
    return folder


def test_the_options_of_older_versions_keep_their_names_and_meaning():
    given = options.parse(
        [
            *("--model", "m", "--data", "d.jsonl", "--eval-data", "e.jsonl", "--output", "out"),
            *("--load-in-4bit", "--max-seq-length", "64", "--r", "8", "--epochs", "0.5"),
            *("--max-steps", "7", "--batch-size", "3", "--learning-rate", "1e-3", "--seed", "5"),
        ]
    )
    expected = dict(model="m", load_in_4bit=True, max_seq_length=64, r=8, num_epochs=0.5)
    expected |= dict(max_steps=7, batch_size=3, learning_rate=1e-3, seed=5, lora_alpha=8)
    assert {name: getattr(given, name) for name in expected} == expected
    assert (str(given.data), str(given.eval_data), str(given.output)) == (
        "d.jsonl", "e.jsonl", "out",
    )  # fmt: skip
    plain = options.parse([])
    assert (plain.num_epochs, plain.batch_size, plain.r, plain.seed) == (2, 4, 16, 3407)
    assert (str(plain.output), plain.learning_rate) == ("runs/adapter", None)


def test_every_setting_of_train_is_an_option_with_its_help():
    names = {f.name for f in dataclasses.fields(options.parse([]))}
    assert {f.name for f in dataclasses.fields(Settings)} <= names
    assert options.help_texts(train).keys() == inspect.signature(train).parameters.keys()
    given = options.parse(["--learning-rates", "B", "1e-3", "--target-modules", "q_proj"])
    settings = options.arguments_for(Settings, given)
    assert settings["learning_rates"] == {"B": 1e-3}
    assert options.arguments_for(options.LoraArguments, given)["target_modules"] == ("q_proj",)


def test_a_toml_file_gives_defaults_and_resolved_options_are_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('epochs = 3\n[adapter]\nr = 4\n[train]\nmax-steps = 9\nlog = ["jsonl"]\n')
    given = options.parse(["--config", str(path), "--max-steps", "5"])
    assert (given.num_epochs, given.r, given.max_steps, given.lora_alpha) == (3, 4, 5, 4)
    path.write_text(to_toml(given))
    again = options.parse(["--config", str(path)])
    both = [dataclasses.asdict(x) | {"config": None} for x in (again, given)]
    assert both[0] == both[1]
    assert tomllib.loads(to_toml(given))["max_steps"] == 5


def test_token_ids_are_an_option_in_every_form(quick, rows, tmp_path, monkeypatch):
    pairs = {"1 2": (1, 2), "embed_tokens 1": {"embed_tokens": [1]}}
    pairs["embed_tokens 1 2 lm_head 3"] = {"embed_tokens": [1, 2], "lm_head": [3]}
    for words, expected in pairs.items():
        given = options.parse(["--trainable-token-indices", *words.split()])
        assert given.trainable_token_indices == expected
        path = tmp_path / "run.toml"
        path.write_text(to_toml(given))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = options.parse(["--config", str(path)])
        assert again.trainable_token_indices == expected
        given = (*quick, "--data", rows, "--dry-run", "--trainable-token-indices", *words.split())
        assert call(monkeypatch, *given) == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('target_modules = "all-linear"', "all-linear"),
        ('exclude_modules = ".*mlp.*"', ".*mlp.*"),
        ('log = "jsonl"', "jsonl"),
        ('template_kwargs = {documents = ["a"]}', {"documents": ["a"]}),
        ('sample_prompts = [[{role = "user"}], "b"]', ([{"role": "user"}], "b")),
        ('max_steps = "x"', "x"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_values_that_only_toml_can_express_are_kept_without_a_warning(line, expected, tmp_path):
    (tmp_path / "run.toml").write_text(line)
    given = options.parse(["--config", str(tmp_path / "run.toml")])
    assert getattr(given, line.split()[0]) == expected


def test_a_repeated_run_has_the_same_bits_or_says_what_differs(first, monkeypatch, capsys):
    assert call(monkeypatch, "--repeat", first / "run.json", "--no-progress") == 0
    assert "has the same bits as" in capsys.readouterr().out
    name = "adapter_model.safetensors"
    again = first.with_name("first-repeat")
    assert (again / name).read_bytes() == (first / name).read_bytes()
    other = first.with_name("other")
    given = ("--repeat", first / "run.json", "--no-progress", "--seed", 4, "--output", other)
    assert call(monkeypatch, *given) == 5
    out = capsys.readouterr().out
    assert "settings, seed: 3407 before, 4 now" in out and "from step 1 on: loss" in out


def test_a_run_of_another_program_is_repeated(rows, quick, tmp_path, monkeypatch, capsys):
    how = dict(dtype="float32", max_seq_length=64, device="cpu", base_precision="fp8")
    base, tokenizer = fastlora.load(quick[2], **how)
    tokens = {"embed_tokens": [1, 2]}
    model = fastlora.lora(base, r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    given = dict(max_steps=2, batch_size=2, output_dir=tmp_path / "run", progress=False)
    train(model, tokenizer, rows, **given)
    assert call(monkeypatch, "--repeat", tmp_path / "run/run.json", "--no-progress") == 0
    assert "has the same bits as" in capsys.readouterr().out


def test_sequences_have_2048_tokens_where_no_length_is_given(quick, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "long"
    shutil.copytree(quick[2], folder)
    config = json.loads((folder / "config.json").read_text())
    for longest, expected in ((4096, 2048), (64, 64)):
        config["max_position_embeddings"] = longest
        (folder / "config.json").write_text(json.dumps(config))
        assert call(monkeypatch, "--model", folder, "--dry-run", "--no-progress") == 0
        assert f"max_seq_length = {expected}\n" in capsys.readouterr().out


def test_an_earlier_run_is_moved_and_not_replaced(first, rows, quick, monkeypatch, capsys):
    given = ("--data", rows, "--eval-data", rows, "--output", first, "--r", 4, *quick)
    assert call(monkeypatch, *given) == 0
    assert f"it is {first}.1 now" in capsys.readouterr().out
    ranks = [
        json.loads((first.with_name(name) / "adapter_config.json").read_text())["r"]
        for name in ("first", "first.1")
    ]
    assert ranks == [4, 2]


def test_settings_and_prediction_come_first_and_a_dry_run_trains_nothing(
    rows, quick, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    assert call(monkeypatch, *quick, "--data", rows, "--output", out, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert (
        "batch_size = 2" in shown
        and "plan: " in shown
        and "rows to train on: 3; held out: 1" in shown
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("row", "bad", "given"),
    [
        ({"question": "Is it 1?", "answer": "yes"}, "", ("--columns", "prompt", "question",
          "completion", "answer")),
        ({"prompt": "Is it 1?", "chosen": "yes", "rejected": "no"}, "", ("--loss", "dpo")),
        ({"prompt": "Is it 1?", "completion": "yes"}, "{bad\n", ("--on-bad-row", "skip")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("held_out", [True, False])
def test_every_kind_of_rows_that_train_takes_is_read(
    quick, tmp_path, monkeypatch, row, bad, given, held_out
):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 8 + bad)
    hold = () if held_out else ("--no-hold-out",)
    given = (*given, *quick, "--data", path, "--output", tmp_path / "out", "--r", 2, *hold)
    assert call(monkeypatch, *given) == 0
    data = json.loads((tmp_path / "out/run.json").read_text())["data"]
    assert data["source"] == (None if held_out else str(path))


@pytest.mark.parametrize(
    ("row", "loss", "number"),
    [
        ({"prompt": "a", "completion": "b"}, "sft", 1),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo", 1),
        ({"prompt": "a", "completion": "b", "label": True}, "kto", 20),
    ],
)
def test_too_few_rows_to_hold_one_out_are_refused_before_loading(
    row, loss, number, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * number)
    given = ("--model", "./missing", "--data", path, "--loss", loss)
    assert call(monkeypatch, *given) == 2
    error = capsys.readouterr().err
    assert f"too few rows ({number})" in error and "--no-hold-out" in error
    assert call(monkeypatch, *given, "--no-hold-out") == 2  # the model is looked up now
    assert "no such folder: './missing'" in capsys.readouterr().err


def test_a_file_that_is_streamed_is_not_divided(quick, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lanes, "STREAM_BYTES", 0)
    monkeypatch.setattr(streams, "BLOCK_TOKENS", 300)
    monkeypatch.setattr(streams, "_LEAST_SEQUENCES", 1)
    monkeypatch.setattr(lanes, "CHUNK_ROWS", 5)
    given = (*quick, "--data", rows, "--output", tmp_path / "out", "--r", 2)
    assert call(monkeypatch, *given) == 2
    assert "give --eval-data or --no-hold-out" in capsys.readouterr().err
    assert call(monkeypatch, *given, "--no-hold-out") == 0
    assert json.loads((tmp_path / "out/run.json").read_text())["data"]["streamed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "missing.jsonl"), "missing.jsonl"),
        (("--config", "CONFIG"), "has colour: expected options"),
        (("--r", "0"), "r=0"),
        (("--learning-rate", "-1"), "learning_rate=-1"),
        (("--context-parallel", "0"), "context_parallel=0"),
    ],
)
def test_unusable_arguments_end_with_code_2(
    quick, monkeypatch, capsys, tmp_path, arguments, message
):
    (tmp_path / "run.toml").write_text("colour = 3\n")
    given = [str(tmp_path / "run.toml") if a == "CONFIG" else a for a in arguments]
    assert call(monkeypatch, *quick, *given, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_other_errors_have_their_codes():
    found = [ValueError(), FloatingPointError(), MemoryError(), OSError(28, "full"), KeyError()]
    assert [exit_code(error) for error in found] == [2, 3, 4, 4, None]


def test_a_missing_tyro_is_named(monkeypatch):
    def missing(module: str):
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[cli\]'"):
        options.parse([])
