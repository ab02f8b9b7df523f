"""train(): the loss it minimises, the steps it takes, and what is left of a run that was killed."""

import copy
import dataclasses
import inspect
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import adapted, relative_error, same_bits
from jaxtyping import TypeCheckError
from models import make_checkpoint
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.checkpoints import tensors
from fastlora.data.batches import batches
from fastlora.data.encoding import encode_rows
from fastlora.data.packing import pack
from fastlora.errors import CheckpointError
from fastlora.formats.peft.names import peft_state_dict
from fastlora.functional import token_logprobs
from fastlora.model import Model
from fastlora.training import checkpoint, loop, settings, step
from fastlora.training.history import History
from fastlora.training.loop import train
from fastlora.training.step import dropout_seed, learning_rate_factor

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "fastlora" / "demo"
WORDS = "a rank is the number of rows that a matrix needs to say all it has to say".split()
LENGTHS = (3, 14, 5, 9, 1, 12, 7, 2, 11, 6)
ROWS = [
    {"prompt": f"{n}:", "completion": " " + " ".join((WORDS * 2)[n : n + length])}
    for n, length in enumerate(LENGTHS)
]
QUIET = dict(progress=False, warmup_ratio=0.0)


@pytest.fixture(scope="module")
def tokenizer() -> fastlora.Tokenizer:
    found = fastlora.Tokenizer.from_folder(DEMO)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random base with the demo's vocabulary, two layers of 32."""
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint("llama2", folder, config=dict(vocab_size=4096))
    return folder


@pytest.fixture(scope="module")
def base(folder) -> Model:
    return fastlora.load(folder, max_seq_length=64, device="cpu")[0]


@pytest.fixture(scope="module")
def model(base) -> Model:
    """B is not zero, so that every leaf has a gradient from the first step on."""
    return adapted(base, r=2, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="module")
def exact(folder) -> Model:
    """The same in float64: what is only rounding disappears."""
    model, _ = fastlora.load(folder, dtype="float64", max_seq_length=64, device="cpu")
    return adapted(model, r=2, target_modules=["q_proj", "v_proj", "down_proj"])


def timeless(history: History) -> History:
    return dataclasses.replace(history, seconds=())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ── the loss and the step ──


def test_training_learns_what_can_be_memorised(base, tokenizer):
    model = fastlora.lora(base, r=16)
    trained, history = train(
        model, tokenizer, ROWS[:3], max_steps=60, learning_rate=2e-2, packing=False, **QUIET
    )
    assert history.losses[0] > 9
    # A random head 32 wide and 4096 tall cannot be surer than this of any token.
    assert history.losses[-1] < 1.7
    said = trained.generate_text(tokenizer, ROWS[1]["prompt"], max_new_tokens=24)
    assert said == ROWS[1]["completion"]


@pytest.mark.parametrize("max_grad_norm", [0.5, None])
def test_steps_equal_adamw_over_gradients_of_transformers_and_peft(
    folder, model, tokenizer, tmp_path, max_grad_norm
):
    model.save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    oracle = peft.PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True).eval()
    leaves = [p for p in oracle.parameters() if p.requires_grad]
    rate, decay = 3e-3, 0.1
    optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=decay)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 1, 4)
    examples = encode_rows(ROWS, tokenizer, max_seq_length=64)
    stream = (b for e in itertools.count() for b in batches(examples, 4, seed=7, epoch=e))
    losses, norms = [], []
    for batch in itertools.islice(stream, 4):
        loss = oracle(**batch).loss
        loss.backward()
        limit = max_grad_norm or math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(leaves, limit).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    trained, history = train(
        model,
        tokenizer,
        ROWS,
        max_steps=4,
        batch_size=4,
        learning_rate=rate,
        warmup_ratio=0.25,
        weight_decay=decay,
        max_grad_norm=max_grad_norm,
        packing=False,
        seed=7,
        progress=False,
    )
    assert history.losses == pytest.approx(losses, rel=1e-6)
    assert history.grad_norms == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.5, "else nothing is clipped"
    theirs = peft.get_peft_model_state_dict(oracle)
    for name, leaf in peft_state_dict(trained.adapter, trained.spec.lora).items():
        # Adam divides by the gradient's size, so its rounding shows where that is near 0.
        assert relative_error(leaf, theirs[name].detach()) < 1e-4, name
    moved = relative_error(trained.adapter, model.adapter)
    assert moved > 100 * 1e-4


@pytest.mark.parametrize("packing", [True, False])
def test_only_the_product_of_batch_size_and_accumulation_counts(exact, tokenizer, packing):
    """Ten rows of 1 to 14 words; 8 do not divide them, so each epoch ends in a smaller step."""
    short = dataclasses.replace(exact, spec=dataclasses.replace(exact.spec, max_seq_length=24))
    results = [
        train(
            short,
            tokenizer,
            ROWS,
            batch_size=8 // accumulation if not packing else 4 // accumulation,
            gradient_accumulation_steps=accumulation,
            num_epochs=2,
            learning_rate=1e-3,
            packing=packing,
            **QUIET,
        )
        for accumulation in (1, 2, 4)
    ]
    (whole, one), *rest = results
    assert len(one.steps) >= 4 and len(set(one.tokens)) > 1
    for split, history in rest:
        assert history.tokens == one.tokens
        assert history.losses == pytest.approx(one.losses, rel=1e-12)
        assert history.grad_norms == pytest.approx(one.grad_norms, rel=1e-12)
        assert relative_error(split.adapter, whole.adapter) < 1e-9


def test_accumulation_is_exact_to_1e_6_in_float32(model, tokenizer):
    """The mean over all tokens of a step; a mean of the micro-batches' means is off by percents."""
    run = dict(max_steps=1, packing=False, **QUIET)
    _, whole = train(model, tokenizer, ROWS, batch_size=10, **run)
    _, split = train(model, tokenizer, ROWS, batch_size=5, gradient_accumulation_steps=2, **run)
    assert split.losses == pytest.approx(whole.losses, rel=1e-6)
    assert split.grad_norms == pytest.approx(whole.grad_norms, rel=1e-6)
    stream = batches(encode_rows(ROWS, tokenizer, max_seq_length=64), 5, seed=3407)
    means = [model.loss(batch).item() for batch in stream]
    assert abs(np.mean(means) / whole.losses[0] - 1) > 1e-4


def test_packing_changes_neither_loss_nor_gradient(exact, tokenizer):
    run = dict(max_steps=1, batch_size=10, **QUIET)
    _, packed = train(exact, tokenizer, ROWS, packing=True, **run)
    _, padded = train(exact, tokenizer, ROWS, packing=False, **run)
    assert packed.tokens == padded.tokens
    assert packed.losses == pytest.approx(padded.losses, rel=1e-12)
    assert packed.grad_norms == pytest.approx(padded.grad_norms, rel=1e-12)


def test_packed_sequences_are_as_long_as_max_seq_length(model, tokenizer, monkeypatch):
    seen = []
    shape = lambda *args, **kw: seen.append(args[3]["input_ids"].shape) or real(*args, **kw)
    real = loop.loss_sum
    monkeypatch.setattr(loop, "loss_sum", shape)
    train(model, tokenizer, ROWS, max_steps=1, batch_size=2, **QUIET)
    assert {s[1] for s in seen} == {64}


def test_clipping_off_is_none_or_zero(model, tokenizer):
    run = dict(max_steps=2, batch_size=4, **QUIET)
    none, zero, small = (
        train(model, tokenizer, ROWS, max_grad_norm=limit, **run)[0].adapter
        for limit in (None, 0, 1e-9)
    )
    assert same_bits(none, zero)
    assert not same_bits(none, small)


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup_steps", "steps"), [(0, 7), (3, 20), (5, 5), (1, 1)])
def test_schedules_are_those_of_transformers(scheduler, warmup_steps, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    counts: dict[str, Any] = {"num_warmup_steps": warmup_steps}
    counts |= {} if scheduler == "constant" else {"num_training_steps": steps}
    name = "constant_schedule_with_warmup" if scheduler == "constant" else f"{scheduler}_schedule"
    name = name.removesuffix("_with_warmup") + "_with_warmup"
    theirs = getattr(transformers, f"get_{name}")(optimizer, **counts)
    for index in range(steps):
        ours = learning_rate_factor(scheduler, index, warmup_steps, steps)
        assert ours == theirs.get_last_lr()[0], index
        optimizer.step()
        theirs.step()


def test_warm_up_is_a_share_of_all_steps_rounded_up(model, tokenizer):
    _, history = train(
        model,
        tokenizer,
        ROWS[:1],
        max_steps=5,
        learning_rate=1e-3,
        lr_scheduler="constant",
        warmup_ratio=0.21,
        progress=False,
    )
    assert history.learning_rates == pytest.approx((0, 5e-4, 1e-3, 1e-3, 1e-3))


# ── data, epochs, dropout ──


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own(model, tokenizer):
    _, history = train(model, tokenizer, ROWS, num_epochs=2, batch_size=1, packing=False, **QUIET)
    first, second = history.tokens[:10], history.tokens[10:]
    assert sorted(first) == sorted(second)
    assert first != second


def test_max_steps_goes_before_epochs_and_epochs_may_be_fractions(model, tokenizer):
    count = lambda **given: len(
        train(model, tokenizer, ROWS, batch_size=4, packing=False, **given, **QUIET)[1].steps
    )
    assert count(num_epochs=1) == 3
    assert count(num_epochs=1.5) == 5
    assert count(num_epochs=9, max_steps=2) == 2


def test_rows_come_from_files_and_iterables_alike(model, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = dict(max_steps=2, batch_size=2, **QUIET)
    results = [train(model, tokenizer, data, **run) for data in (path, str(path), iter(ROWS))]
    assert same_bits(results[0][0].adapter, results[1][0].adapter)
    assert same_bits(results[0][0].adapter, results[2][0].adapter)


def test_prompts_are_trained_where_asked(model, tokenizer):
    tokens = [
        train(model, tokenizer, ROWS, max_steps=1, batch_size=99, train_on=on, **QUIET)[1].tokens[0]
        for on in ("responses", "all")
    ]
    assert 0 < tokens[0] < tokens[1]


def test_every_micro_batch_of_every_step_has_masks_of_its_own(base, tokenizer, monkeypatch):
    seeds, real = [], loop.loss_sum
    number = lambda seed: None if seed is None else int(seed)
    record = lambda *args, **kw: seeds.append(number(kw.get("seed"))) or real(*args, **kw)
    monkeypatch.setattr(loop, "loss_sum", record)
    run = dict(max_steps=3, batch_size=2, gradient_accumulation_steps=2, packing=False, **QUIET)
    dropping = fastlora.lora(base, r=2, lora_dropout=0.5, target_modules=["q_proj"])
    train(dropping, tokenizer, ROWS, eval_data=ROWS[:1], seed=5, **run)
    trained, evaluated = seeds[:-1], seeds[-1]
    assert evaluated is None
    # Rows 9 and 10 are the epoch's last step: one micro-batch.
    assert trained == [dropout_seed(5, s, i) for s, i in [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]]
    assert len(set(trained)) == 5
    seeds.clear()
    train(fastlora.lora(base, r=2, target_modules=["q_proj"]), tokenizer, ROWS, **run)
    assert set(seeds) == {None}


def test_dropout_seeds_differ_in_each_of_their_three_numbers():
    grid = itertools.product((0, 1, 3407, 2**40), range(1, 8), range(4))
    seeds = [dropout_seed(*numbers) for numbers in grid]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# ── evaluation, history, log, bar ──


def test_evaluation_is_the_mean_over_all_held_out_tokens(model, tokenizer):
    held_out = ROWS[:5]
    trained, history = train(
        model, tokenizer, ROWS[5:], eval_data=held_out, eval_every=2, max_steps=5, batch_size=2,
        packing=False, **QUIET,
    )  # fmt: skip
    assert history.eval_steps == (2, 4, 5)
    logp, tokens = 0.0, 0
    for example in encode_rows(held_out, tokenizer, max_seq_length=64):
        ids, labels = (torch.tensor(x)[None] for x in (example.input_ids, example.labels))
        logp += (
            token_logprobs(trained.adapter, trained.base, trained.spec, ids, labels).sum().item()
        )
        tokens += int((labels != -100).sum())
    assert history.eval_losses[-1] == pytest.approx(-logp / tokens, rel=1e-6)
    _, last_only = train(model, tokenizer, ROWS, eval_data=ROWS, max_steps=3, **QUIET)
    assert last_only.eval_steps == (3,)
    assert train(model, tokenizer, ROWS, max_steps=1, **QUIET)[1].eval_steps == ()


def test_evaluating_does_not_change_the_run(model, tokenizer):
    run = dict(max_steps=3, batch_size=2, **QUIET)
    plain, watched = (
        train(model, tokenizer, ROWS, **run, **more)
        for more in ({}, dict(eval_data=ROWS, eval_every=1))
    )
    assert same_bits(plain[0].adapter, watched[0].adapter)


def test_log_is_called_with_every_step_of_the_history(model, tokenizer):
    records: list[dict] = []
    _, history = train(
        model, tokenizer, ROWS, eval_data=ROWS, eval_every=2, max_steps=3, batch_size=2,
        log=records.append, **QUIET,
    )  # fmt: skip
    always = {"step", "loss", "learning_rate", "tokens", "seconds", "grad_norm"}
    assert [set(r) - {"eval_loss"} for r in records] == [always] * 3
    assert ["eval_loss" in r for r in records] == [False, True, True]
    assert History.of(records) == history
    assert history.steps == (1, 2, 3)
    assert all(s > 0 for s in history.seconds)
    with pytest.raises(dataclasses.FrozenInstanceError):
        history.steps = ()  # type: ignore[misc]


def test_what_log_does_to_its_dict_stays_there(model, tokenizer):
    _, history = train(model, tokenizer, ROWS, max_steps=2, log=dict.clear, **QUIET)
    assert len(history.losses) == 2


def test_without_progress_nothing_is_printed(model, tokenizer, capfd, tmp_path):
    run = dict(max_steps=2, eval_data=ROWS, save_every=1)
    train(model, tokenizer, ROWS, progress=False, output_dir=tmp_path / "quiet", **run)
    assert capfd.readouterr() == ("", "")
    train(model, tokenizer, ROWS, output_dir=tmp_path / "loud", **run)
    out, err = capfd.readouterr()
    assert out == ""
    assert all(word in err for word in ("2/2", "loss=", "tokens/s=", "eval="))


# ── nothing else changes ──


def test_the_same_arguments_give_the_same_bits(base, tokenizer):
    model = fastlora.lora(base, r=2, lora_dropout=0.3)
    run = dict(max_steps=4, batch_size=2, learning_rate=1e-2, progress=False)
    one, two, other = (train(model, tokenizer, ROWS, seed=s, **run) for s in (1, 1, 2))
    assert same_bits(one[0].adapter, two[0].adapter)
    assert timeless(one[1]) == timeless(two[1])
    assert not same_bits(one[0].adapter, other[0].adapter)


def test_model_data_and_global_state_are_left_as_they_were(model, tokenizer):
    model = model.for_training()
    leaves = tree_leaves((model.adapter, model.base))
    before = [(x, x.clone(), x.requires_grad, x._version) for x in leaves]
    rows, state = copy.deepcopy(ROWS), global_state()
    trained, _ = train(model, tokenizer, rows, eval_data=rows, max_steps=2, **QUIET)
    assert global_state() == state
    assert rows == ROWS
    for now, (x, value, requires_grad, version) in zip(leaves, before, strict=True):
        assert now is x and torch.equal(x, value) and x.grad is None
        assert (x.requires_grad, x._version) == (requires_grad, version)
    new = tree_leaves(trained.adapter)
    assert not any(x.requires_grad or x.grad is not None for x in new)
    assert not {x.data_ptr() for x in new} & {x.data_ptr() for x in leaves}
    assert trained.base is model.base and trained.spec == model.spec


def global_state() -> tuple:
    """Without Python's own random: beartype draws from it wherever these tests check a type."""
    return (
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        str(np.random.get_state()),
        dict(os.environ),
    )


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_a_bfloat16_base_trains_with_either_adapter(folder, tokenizer, adapter_dtype):
    base, _ = fastlora.load(folder, dtype="bfloat16", max_seq_length=64, device="cpu")
    model = fastlora.lora(base, r=4, adapter_dtype=adapter_dtype)
    trained, history = train(
        model, tokenizer, ROWS[:2], max_steps=15, learning_rate=2e-2,
        gradient_accumulation_steps=2, batch_size=1, packing=False, **QUIET,
    )  # fmt: skip
    assert history.losses[-1] < history.losses[0] - 2
    assert {str(x.dtype) for x in tree_leaves(trained.adapter)} == {f"torch.{adapter_dtype}"}


# ── checkpoints ──

LONG = dict(
    max_steps=6,  # ten rows in steps of four: the second epoch begins with step 4
    batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    weight_decay=0.1,
    packing=False,
    eval_every=2,
    save_every=2,
    progress=False,
)


@pytest.fixture(scope="module")
def dropping(base) -> Model:
    return adapted(base, r=2, lora_dropout=0.2, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def uninterrupted(dropping, tokenizer) -> tuple[Model, History]:
    given = {name: value for name, value in LONG.items() if name != "save_every"}
    return train(dropping, tokenizer, ROWS, eval_data=ROWS[:3], **given)


class Killed(BaseException):
    pass


def long_run(model: Model, tokenizer: Any, folder: Path, **changed: Any) -> tuple[Model, History]:
    given = LONG | dict(output_dir=folder, eval_data=ROWS[:3]) | changed
    return train(model, tokenizer, given.pop("data", ROWS), **given)


def stop_at(step: int):
    def log(record: dict) -> None:
        if record["step"] == step:
            raise Killed

    return log


@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize("by_path", [False, True])
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(
    dropping, uninterrupted, tokenizer, tmp_path, stop, by_path
):
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path, log=stop_at(stop))
    resume = tmp_path / f"checkpoint-{stop // 2 * 2}" if by_path else True
    # The adapter that resume is given does not matter, only its shape.
    fresh = adapted(dropping.with_adapter(None), seed=9, r=2, lora_dropout=0.2,
                    target_modules=["q_proj", "down_proj"])  # fmt: skip
    records: list[dict] = []
    trained, history = long_run(fresh, tokenizer, tmp_path, resume=resume, log=records.append)
    assert [r["step"] for r in records] == list(range(stop // 2 * 2 + 1, 7))
    assert same_bits(trained.adapter, uninterrupted[0].adapter)
    assert timeless(history) == timeless(uninterrupted[1])
    assert len(history.seconds) == 6


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_that_is_played_back_has_the_same_bits(
    dropout, folder, tokenizer, captures, monkeypatch
):
    """Micro-batches of one shape are one recording, whatever their tokens, seed and numbers."""
    base, _ = fastlora.load(folder, max_seq_length=32, device="cpu")
    model = adapted(base, r=2, lora_dropout=dropout)
    given = dict(packing=True, batch_size=1, gradient_accumulation_steps=2, max_steps=5, **QUIET)
    plain = train(model, tokenizer, ROWS, **given)
    assert not captures
    monkeypatch.setattr(step, "use_cuda_graph", lambda *_: True)
    played = train(model, tokenizer, ROWS, **given)
    assert len(captures) == 1
    assert same_bits(plain[0].adapter, played[0].adapter)
    assert timeless(plain[1]) == timeless(played[1])


def settings(**given) -> settings.Settings:
    """train's own, but for these."""
    names = [field.name for field in dataclasses.fields(settings.Settings)]
    return settings.Settings(**{name: DEFAULTS[name] for name in names} | given)


def test_what_is_large_or_of_many_shapes_is_not_recorded(model, base):
    assert step.use_cuda_graph(model.spec, "cuda", settings())
    assert not step.use_cuda_graph(model.spec, "cpu", settings())
    assert not step.use_cuda_graph(model.spec, "cuda", settings(packing=False))
    assert not step.use_cuda_graph(model.spec, "cuda", settings(batch_size=2**24))
    offload = dataclasses.replace(model.spec, recompute="offload")
    assert not step.use_cuda_graph(offload, "cuda", settings())
    for given in (dict(trainable_token_indices=[5]), dict(qat_scheme="int8")):
        unlike = fastlora.lora(base, r=2, **given)
        assert not step.use_cuda_graph(unlike.spec, "cuda", settings())


def test_a_mixture_is_not_recorded(pair):
    spec = adapted(pair("qwen3_moe").model, r=2).spec
    assert not step.use_cuda_graph(spec, "cuda", settings())


def test_a_packed_bfloat16_run_resumes_with_the_same_bits(folder, tokenizer, tmp_path):
    base, _ = fastlora.load(folder, dtype="bfloat16", max_seq_length=32, device="cpu")
    model = fastlora.lora(base, r=2, adapter_dtype="bfloat16")
    given = dict(packing=True, learning_rate=1e-2, weight_decay=0.0)
    whole, history = long_run(model, tokenizer, tmp_path / "whole", **given)
    with pytest.raises(Killed):
        long_run(model, tokenizer, tmp_path / "cut", log=stop_at(3), **given)
    resumed, again = long_run(model, tokenizer, tmp_path / "cut", resume=True, **given)
    assert same_bits(resumed.adapter, whole.adapter)
    assert timeless(again) == timeless(history)


def test_a_checkpoint_is_an_adapter_folder_and_the_last_one_the_result(
    dropping, tokenizer, tmp_path
):
    trained, history = long_run(dropping, tokenizer, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in (2, 4, 6)
    ]
    for saved in (tmp_path, tmp_path / "checkpoint-6"):
        assert same_bits(fastlora.load_adapter(dropping, saved).adapter, trained.adapter)
    earlier = fastlora.load_adapter(dropping, tmp_path / "checkpoint-4").adapter
    assert not same_bits(earlier, trained.adapter)
    # A run that has ended resumes to its own result.
    again, same = long_run(dropping, tokenizer, tmp_path, resume=True)
    assert same_bits(again.adapter, trained.adapter) and same == history


def test_a_kill_at_any_write_of_a_save_leaves_the_older_checkpoint(
    dropping, uninterrupted, tokenizer, tmp_path, monkeypatch
):
    """A checkpoint is five files; the process dies half-way through each in turn."""
    real = tensors.atomic_write
    for fatal in range(5):
        folder, second = tmp_path / str(fatal), itertools.count()

        def write(path, write, second=second, fatal=fatal):
            if path.parent.name == "checkpoint-4" and next(second) == fatal:
                path.with_name(f".{path.name}.dead.tmp").write_bytes(b"half")
                raise Killed
            real(path, write)

        monkeypatch.setattr(tensors, "atomic_write", write)
        with pytest.raises(Killed):
            long_run(dropping, tokenizer, folder)
        monkeypatch.setattr(tensors, "atomic_write", real)
        assert list(checkpoint._checkpoints(folder)) == [2]
        trained, history = long_run(dropping, tokenizer, folder, resume=True)
        assert same_bits(trained.adapter, uninterrupted[0].adapter)
        assert timeless(history) == timeless(uninterrupted[1])


def test_a_process_that_is_killed_resumes(folder, base, tokenizer, tmp_path):
    """SIGKILL while the second checkpoint's moments are on their way to the disk."""
    script = textwrap.dedent(f"""
        import os, signal, json, fastlora
        from pathlib import Path
        replace = os.replace
        def dying(source, target):
            if target.parent.name == "checkpoint-4" and target.name == "optimizer.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
        os.replace = dying
        model, _ = fastlora.load({str(folder)!r}, max_seq_length=64, device="cpu")
        model = fastlora.lora(model, r=2)
        tokenizer = fastlora.Tokenizer.from_folder(Path({str(DEMO)!r}))
        rows = json.loads({json.dumps(ROWS)!r})
        given = {LONG | {"eval_every": None, "output_dir": str(tmp_path)}!r}
        fastlora.train(model, tokenizer, rows, **given)
    """)
    environ = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    ended = subprocess.run([sys.executable, "-c", script], env=environ, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    model, given = fastlora.lora(base, r=2), dict(eval_every=None, eval_data=None)
    resumed, _ = long_run(model, tokenizer, tmp_path, resume=True, **given)
    whole, _ = long_run(model, tokenizer, tmp_path / "whole", **given)
    assert same_bits(resumed.adapter, whole.adapter)


@pytest.fixture(scope="module")
def cut(dropping, tokenizer, tmp_path_factory) -> Path:
    """output_dir of a run that stopped after checkpoint-4."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, folder, log=stop_at(4))
    return folder


DEFAULTS = {name: p.default for name, p in inspect.signature(train).parameters.items()}
CHANGES = dict(
    learning_rate=2e-2,
    batch_size=3,
    gradient_accumulation_steps=1,
    lr_scheduler="linear",
    warmup_ratio=0.5,
    weight_decay=0.0,
    max_grad_norm=2.0,
    train_on="all",
    packing=True,
    seed=4,
)


def test_every_setting_that_would_change_the_run_is_listed(
    folder, dropping, tokenizer, cut, tmp_path
):
    before = files(cut)
    with pytest.raises(ValueError) as refused:
        long_run(dropping, tokenizer, cut, resume=True, **CHANGES, max_steps=7)
    for name, value in CHANGES.items():
        given = LONG.get(name, DEFAULTS[name])
        assert f"{name}: {given!r} there, {value!r} now" in str(refused.value)
    assert "steps of the whole run: 6 there, 7 now" in str(refused.value)
    assert "hash of the training data" in str(refused.value), "packed, and trained on all"

    other = adapted(dropping.with_adapter(None), r=4, lora_dropout=0.1, target_modules=["q_proj"])
    merged = fastlora.merge(dropping)
    merged = dataclasses.replace(dropping, base=merged.base)
    for model, data, *words in (
        (other, ROWS, "r: 2 there, 4 now", "lora_dropout: 0.2 there, 0.1 now",
         "layers.1.mlp.down_proj: {'r': 2, 'scaling': 8.0} there, absent now"),
        (merged, ROWS, "hash of the base model"),
        (dropping, ROWS[:-1] + ROWS[:1], "hash of the training data"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as refused:
            long_run(model, tokenizer, cut, resume=True, data=data)
        assert all(word in str(refused.value) for word in words), refused.value
        assert "learning_rate" not in str(refused.value)
    assert files(cut) == before


def test_a_run_at_a_constant_rate_can_be_prolonged(dropping, tokenizer, tmp_path):
    given = dict(lr_scheduler="constant", warmup_ratio=0.0, eval_data=None, eval_every=None)
    whole, _ = long_run(dropping, tokenizer, tmp_path / "a", **given)
    long_run(dropping, tokenizer, tmp_path / "b", **given, max_steps=3)
    longer, _ = long_run(dropping, tokenizer, tmp_path / "b", **given, resume=True)
    assert same_bits(longer.adapter, whole.adapter)
    with pytest.raises(ValueError, match=r"checkpoint-6 is of step 6, but .* at step 5"):
        long_run(dropping, tokenizer, tmp_path / "b", **given, max_steps=5, resume=True)


def test_checkpoints_are_never_written_over(dropping, tokenizer, cut, tmp_path):
    before = files(cut)
    with pytest.raises(ValueError, match="checkpoint-2, checkpoint-4, and this run begins anew"):
        long_run(dropping, tokenizer, cut)
    with pytest.raises(ValueError, match=r"holds checkpoint-4, and this run begins after .*-2:"):
        long_run(dropping, tokenizer, cut, resume=cut / "checkpoint-2")
    assert files(cut) == before
    long_run(dropping, tokenizer, tmp_path / "other", resume=cut / "checkpoint-2")
    assert list(checkpoint._checkpoints(tmp_path / "other")) == [4, 6]


def test_resume_needs_a_whole_checkpoint(dropping, tokenizer, cut, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint"):
        long_run(dropping, tokenizer, tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match=r"\['checkpoint-2', 'checkpoint-4'\]"):
        long_run(dropping, tokenizer, tmp_path, resume=cut)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.safetensors"])
@pytest.mark.parametrize("content", ["half", "another"])
def test_a_broken_checkpoint_is_refused(dropping, tokenizer, cut, tmp_path, name, content):
    saved = tmp_path / "checkpoint-4"
    saved.mkdir()
    for path in (cut / "checkpoint-4").iterdir():
        (saved / path.name).write_bytes(path.read_bytes())
    whole = (saved / name).read_bytes()
    if content == "half":
        (saved / name).write_bytes(whole[: len(whole) // 2])
    elif name.endswith("json"):
        (saved / name).write_text('{"settings": 3}')
    else:
        tensors.write_safetensors(saved / name, {"model.x": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=name):
        long_run(dropping, tokenizer, tmp_path / "out", resume=saved)
    assert not (tmp_path / "out").exists()


# ── what is refused ──


def test_all_wrong_arguments_are_named_at_once(base, tmp_path):
    wrong = dict(
        max_steps=0,
        num_epochs=-1.0,
        batch_size=0,
        gradient_accumulation_steps=True,
        learning_rate=float("nan"),
        lr_scheduler="polynomial",
        warmup_ratio=1.5,
        weight_decay=-0.1,
        max_grad_norm=-1.0,
        optimizer="sgd",
        train_on="prompts",
        eval_every=0,
        save_every=-2,
        seed=-1,
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError) as refused:
        train(base, None, "no.jsonl", output_dir=tmp_path / "file" / "run", **wrong)
    message = str(refused.value)
    assert all(f"{name}={value!r}: expected" in message for name, value in wrong.items())
    for words in ("no adapter", "tokenizer is None", "file is a file", "without eval_data"):
        assert words in message
    with pytest.raises(ValueError, match=r"(?s)save_every=1 without.*resume=True without"):
        train(base, None, [], save_every=1, resume=True)


@pytest.mark.parametrize("wrong", [{"log": 3}, {"resume": 3}, {"packing": "yes"}])
def test_what_is_of_the_wrong_type_is_named(model, tokenizer, wrong):
    with pytest.raises((ValueError, TypeCheckError), match=next(iter(wrong))):
        train(model, tokenizer, ROWS, **wrong)


def test_a_paged_optimizer_is_refused_without_cuda(model, exact, tokenizer):
    with pytest.raises(ValueError, match=r"paged_adamw_8bit.*on the CPU"):
        train(model, tokenizer, ROWS, optimizer="paged_adamw_8bit")
    with pytest.raises(ValueError, match=r"adamw_8bit.*float64"):
        train(exact, tokenizer, ROWS, optimizer="adamw_8bit")


def test_data_is_refused_before_anything_is_written(model, tokenizer, tmp_path):
    out = tmp_path / "out"
    run = dict(output_dir=out, save_every=1, progress=False)
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        train(model, tokenizer, tmp_path / "no.jsonl", **run)
    with pytest.raises(ValueError, match="no token to train"):
        train(model, tokenizer, [{"prompt": "a", "completion": ""}], **run)
    with pytest.raises(ValueError, match="holds no rows"):
        train(model, tokenizer, ROWS, eval_data=[], **run)
    with pytest.raises(ValueError, match="more than max_seq_length"):
        train(model, tokenizer, [{"prompt": "a", "completion": " b" * 80}], **run)
    assert not out.exists()


def test_a_tokenizer_of_another_model_is_refused(tokenizer, tmp_path):
    make_checkpoint("llama2", tmp_path)
    model = fastlora.lora(fastlora.load(tmp_path, device="cpu")[0], r=2)
    with pytest.raises(ValueError, match=r"vocabulary is \[0, 96\)"):
        train(model, tokenizer, ROWS)


def test_a_place_that_cannot_be_written_is_refused_before_training(
    folder, model, tokenizer, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="the base was loaded from"):
        train(model, tokenizer, ROWS, output_dir=folder)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match="not writable"):
        train(model, tokenizer, ROWS, output_dir=tmp_path / "a")


def test_a_float16_adapter_is_refused(base, tokenizer):
    model = fastlora.lora(base, r=2, adapter_dtype="float16")
    with pytest.raises(ValueError, match="adapter_dtype='float32'"):
        train(model, tokenizer, ROWS)


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_the_files(model, tokenizer, tmp_path):
    run = dict(output_dir=tmp_path, save_every=1, max_steps=3, **QUIET)
    with pytest.raises(FloatingPointError, match="step 2: the loss is"):
        train(model, tokenizer, ROWS, learning_rate=1e30, **run)
    assert list(checkpoint._checkpoints(tmp_path)) == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]
    broken = model.with_adapter(
        torch.utils._pytree.tree_map(lambda x: x.clone().fill_(torch.inf), model.adapter)
    )
    with pytest.raises(FloatingPointError, match=r"step 1: .*adapter"):
        train(broken, tokenizer, ROWS, output_dir=tmp_path / "new", max_steps=3, **QUIET)
    assert not (tmp_path / "new").exists()


def test_long_text_is_split_when_packed_and_refused_when_not(model, tokenizer):
    rows = [{"text": " ".join(WORDS * 12)}]
    long = len(encode_rows(rows, tokenizer, max_seq_length=10**6)[0].input_ids)
    _, history = train(model, tokenizer, rows, max_steps=1, **QUIET)
    assert history.tokens == (long - 1,)
    assert len(pack(encode_rows(rows, tokenizer, max_seq_length=64, split_text=True), 64)) > 1
    with pytest.raises(ValueError, match="more than max_seq_length"):
        train(model, tokenizer, rows, packing=False, **QUIET)


# ── mixtures of experts ──


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Model:
    """LoRA on experts, router and attention, B not zero."""
    folder = tmp_path_factory.mktemp("mixture")
    make_checkpoint("qwen3_moe_mixed", folder, config=dict(vocab_size=4096))
    model, _ = fastlora.load(folder, max_seq_length=64, device="cpu")
    return adapted(model, r=2, target_modules="all-linear")


def test_every_leaf_of_a_mixture_is_trained(mixture, tokenizer):
    trained, history = train(mixture, tokenizer, ROWS, max_steps=6, learning_rate=1e-2, **QUIET)
    assert history.losses[-1] < history.losses[0]
    leaves = zip(tree_leaves(trained.adapter), tree_leaves(mixture.adapter), strict=True)
    assert all(not torch.equal(x, y) for x, y in leaves)


def test_a_resumed_mixture_is_the_same_run(mixture, tokenizer, tmp_path):
    how: dict[str, Any] = dict(max_steps=4, batch_size=2, learning_rate=1e-2, **QUIET)
    whole, _ = train(mixture, tokenizer, ROWS, output_dir=tmp_path, save_every=2, **how)
    resumed, _ = train(mixture, tokenizer, ROWS, resume=tmp_path / "checkpoint-2", **how)
    assert same_bits(resumed.adapter, whole.adapter)


# ── what is trained beside the projections ──

BESIDE = {
    "copies, norms, rows": dict(
        modules_to_save=["norm", "lm_head"], trainable_token_indices=[5, 9, 300]
    ),
    "LoRA on both ends": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_a_run_that_trains_more_than_projections_resumes(beside, base, tokenizer, tmp_path):
    model = adapted(base, **dict(r=2, target_modules=["q_proj"]) | BESIDE[beside])
    given = dict(eval_every=None, eval_data=None)
    whole, _ = long_run(model, tokenizer, tmp_path / "whole", **given)
    leaves = zip(tree_leaves(whole.adapter), tree_leaves(model.adapter), strict=True)
    assert all(not torch.equal(after, before) for after, before in leaves)
    with pytest.raises(Killed):
        long_run(model, tokenizer, tmp_path / "cut", log=stop_at(3), **given)
    resumed, _ = long_run(model, tokenizer, tmp_path / "cut", resume=True, **given)
    assert same_bits(resumed.adapter, whole.adapter)
    other = fastlora.lora(base, r=2, target_modules=["q_proj"], modules_to_save=["model.norm"])
    with pytest.raises(ValueError, match="tensors trained whole"):
        long_run(other, tokenizer, tmp_path / "cut", resume=True, **given)


def test_a_grown_vocabulary_is_trained_saved_and_resumed(base, tokenizer, tmp_path):
    model, grown, ids = fastlora.add_tokens(base, tokenizer, ["<think>", "</think>"])
    model = fastlora.lora(model, r=2, trainable_token_indices={"embed_tokens": ids, "lm_head": ids})
    rows = [{"prompt": r["prompt"], "completion": f"<think>{r['completion']}"} for r in ROWS]
    how = dict(max_steps=4, packing=False, learning_rate=1e-2, save_every=2, **QUIET)
    trained, _ = train(model, grown, rows, output_dir=tmp_path, **how)
    again = dict(resume=tmp_path / "checkpoint-2", output_dir=tmp_path / "again")
    resumed, _ = train(model, grown, rows, **again, **how)
    assert same_bits(resumed.adapter, trained.adapter)
    moved = trained.adapter["tokens"]["lm_head"] - model.adapter["tokens"]["lm_head"]
    assert moved[0].abs().max() > 1e-3
    grown.save_pretrained(tmp_path)
    again = fastlora.load_adapter(base, tmp_path)
    assert again.spec.config.vocab_size == 4098
    inputs = torch.tensor([grown.encode("<think>x</think>")])
    torch.testing.assert_close(again(inputs), trained(inputs), rtol=0, atol=0)
