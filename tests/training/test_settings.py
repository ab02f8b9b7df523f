"""Settings, rows and folders that train() refuses."""

import dataclasses
import os
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from jaxtyping import TypeCheckError

import fastlora
from fastlora.data.encoding import RowLimits, encode_rows
from fastlora.data.packing import pack
from fastlora.data.reading import read_examples
from fastlora.training import checkpoint, offload_memory
from fastlora.training.common_run import check_part_masks
from fastlora.training.loop import train
from fastlora.training.run import Run
from fastlora.training.settings import memory_problems
from oracles.checkpoints import make_checkpoint
from oracles.training_runs import QUIET, ROWS, WORDS, settings


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
def test_an_argument_of_a_wrong_type_is_named(model, tokenizer, wrong):
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


def test_an_unwritable_output_dir_is_refused_before_training(
    folder, model, tokenizer, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="the base was loaded from"):
        train(model, tokenizer, ROWS, output_dir=folder)
    fastlora.merge(model).save_pretrained_merged(tmp_path / "merged")
    with pytest.raises(ValueError, match=r"output_dir: .*merged holds files of another model"):
        train(model, tokenizer, "no.jsonl", output_dir=tmp_path / "merged")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match="not writable"):
        train(model, tokenizer, ROWS, output_dir=tmp_path / "a")


def test_sequences_of_one_token_are_refused(folder, tokenizer, tmp_path):
    model, _ = fastlora.load(folder, max_seq_length=1, device="cpu")
    model = fastlora.lora(model, r=2)
    with pytest.raises(ValueError, match=r"max_seq_length is 1, .* at least 2 tokens"):
        train(model, tokenizer, [{"text": "a b"}], output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match=r"max_seq_length=1: expected a whole number >= 2"):
        read_examples([{"text": "a b"}], tokenizer, RowLimits(1, split_text=True))


def test_a_float16_adapter_is_refused(base, tokenizer):
    model = fastlora.lora(base, r=2, adapter_dtype="float16")
    with pytest.raises(ValueError, match="adapter_dtype='float32'"):
        train(model, tokenizer, ROWS)


def test_a_nonfinite_loss_names_the_step_and_leaves_the_files(model, tokenizer, tmp_path):
    run = dict(output_dir=tmp_path, save_every=1, max_steps=3, **QUIET)
    with pytest.raises(FloatingPointError, match="step 2: the loss is"):
        train(model, tokenizer, ROWS, learning_rate=1e30, **run)
    assert list(checkpoint.complete_checkpoints(tmp_path)) == [1]
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


@pytest.mark.parametrize(
    "wrong",
    [
        dict(learning_rate=1e39),
        dict(weight_decay=1e308),
        dict(max_grad_norm=1e39),
        dict(num_epochs=1.7e308),
        dict(max_steps=10**400),
        dict(batch_size=10**400),
        dict(gradient_accumulation_steps=10**400),
        dict(eval_every=2**31),
        dict(save_every=10**400),
        dict(seed=2**64),
    ],
)
def test_numbers_beyond_all_use_are_refused_before_the_first_step(model, tokenizer, wrong):
    records: list[dict] = []
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*: expected"):
        train(model, tokenizer, ROWS, log=records.append, **QUIET | wrong)
    assert not records


@pytest.mark.parametrize(
    ("dtype", "head_dim", "kernels", "refused"),
    [
        (torch.bfloat16, 64, "triton", False),
        (torch.float16, 128, "triton", False),
        (torch.bfloat16, 64, "torch", True),
        (torch.bfloat16, 32, "triton", True),
        (torch.float32, 64, "triton", True),
    ],
)
def test_long_sequences_are_refused_only_where_the_mask_is_built(
    model, dtype, head_dim, kernels, refused
):
    """Triton's interpreter stands for a GPU here."""
    config = dataclasses.replace(model.spec.config, head_dim=head_dim)
    spec = dataclasses.replace(model.spec, config=config, kernels=kernels, max_seq_length=131_072)
    base = model.base | {"norm": torch.ones(8).to(dtype)}
    long = dataclasses.replace(model, spec=spec, base=base)
    problems = memory_problems(settings(batch_size=1), long)
    assert bool(problems) == refused
    assert not refused or "mask of 16 GiB" in problems[0]
    assert not memory_problems(settings(batch_size=1, packing=False), long)


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # pyright: ignore


@pytest.mark.parametrize(
    ("free_gib", "pinned_gib", "refused"), [(42, 0, True), (43, 0, False), (3, 40, False)]
)
def test_a_host_that_cannot_keep_the_activations_is_named(
    model, free_gib, pinned_gib, refused, monkeypatch
):
    """An 8B model and 131,072 tokens: 32 inputs of 1 GiB, and attention's tensors of 3 layers.

    What an earlier run has pinned is used again.
    """
    monkeypatch.setattr(offload_memory, "free_host_memory", lambda: free_gib * 2**30)
    pinned = {"allocated_bytes.current": pinned_gib * 2**30}
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: pinned)
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128)
    heads = dict(num_attention_heads=32, num_key_value_heads=8)
    of_layers = dict(layer_types=("full_attention",) * 32, sparse_layers=(False,) * 32)
    config = dataclasses.replace(model.spec.config, **sizes, **heads, **of_layers)
    spec = dataclasses.replace(model.spec, config=config, recompute="offload", kernels="triton")
    base = model.base | {"norm": torch.ones(8).bfloat16().as_subclass(OnGPU)}
    spec = dataclasses.replace(spec, max_seq_length=131_072)
    long = dataclasses.replace(model, spec=spec, base=base)
    problems = memory_problems(settings(batch_size=1), long)
    assert bool(problems) == refused
    assert not refused or "keeps 42 GiB of activations in pinned host memory" in problems[0]
    assert not memory_problems(settings(batch_size=1, packing=False), long)


@pytest.mark.parametrize(("ranks", "length", "refused"), [(2, 131_072, False), (2, 196_608, True)])
@pytest.mark.parametrize("streamed", [False, True])
def test_masks_of_rows_that_ranks_have_together_are_reckoned(
    model, ranks, length, refused, streamed
):
    """Not by the model's length, unless the rows are not known."""
    row = SimpleNamespace(input_ids=range(length))
    how = settings(batch_size=1, packing=False, context_parallel=ranks)
    rows = [] if streamed else [SimpleNamespace(input_ids=range(5)), row]
    stream = object() if streamed else None
    run = Mock(spec=Run, settings=how, sequences=rows, eval_sequences=[], stream=stream)
    spec = dataclasses.replace(model.spec, max_seq_length=length if streamed else 262_144)
    long = dataclasses.replace(model, spec=spec)
    if refused:
        said = f"each rank, .* rows of {length} tokens needs .* mask of 18 GiB, .*kernels='auto'; l"
        with pytest.raises(ValueError, match=said):
            check_part_masks(run, long)
    else:
        check_part_masks(run, long)
    run.settings = settings(batch_size=1, packing=False)  # a process alone needs no mask
    check_part_masks(run, long)


@pytest.mark.parametrize("packing", [True, False])
def test_a_pad_id_beyond_the_vocabulary_does_not_matter(model, tokenizer, monkeypatch, packing):
    run = dict(max_steps=3, batch_size=4, packing=packing, **QUIET)
    theirs = train(model, tokenizer, ROWS, **run)[1].losses
    monkeypatch.setattr(type(tokenizer), "pad_token_id", property(lambda _: 4096))
    assert train(model, tokenizer, ROWS, **run)[1].losses == pytest.approx(theirs, rel=1e-6)
