"""Bad calls of train, the Model's calls and generation, and the functions of functional."""

import math
from collections.abc import Iterator
from typing import Any

import torch

import fastlora
from fastlora import functional as FL
from faults.case import IDS, Case, Context, call_functional
from faults.values import (
    CHOICE,
    COUNT,
    FLAG,
    FUNCTION,
    HUGE,
    MODEL,
    NOT_NUMBERS,
    NUMBER,
    PATH,
    POSITIVE,
    SEED,
    SHARE,
    SIZE,
    STRANGER,
    TENSOR,
    TOKENIZER,
    bad_calls,
)

IDS_WRONG = (
    None,
    *TENSOR,
    IDS.float(),
    IDS[0],
    IDS[None],
    IDS[:0],
    IDS[:, :0],
    IDS + 60,
    IDS - 60,
    IDS.bool(),
    IDS.repeat(1, 20),
)
MASK_WRONG = (*TENSOR, IDS[:1], IDS.T.contiguous(), IDS[0], torch.ones(2, 6).double())
MASK_VALUES = (torch.full((2, 6), 2), torch.full((2, 6), -1))
POSITIONS_WRONG = (*TENSOR, IDS[:, :2], IDS.T.contiguous(), IDS[0], IDS.double(), IDS - 60)
SEGMENTS_WRONG = (*TENSOR, IDS[:, :2], IDS.T.contiguous(), IDS[0], IDS.double())
LABELS_WRONG = (*TENSOR, IDS.T.contiguous(), IDS[:1], IDS[:, :2], IDS.float(), IDS[0])
LABELS_VALUES = (IDS + 60, IDS - 160)
SEED_WRONG = (*SEED, torch.zeros(2, dtype=torch.int64), torch.zeros(()))
STOPS_WRONG = ("</s>", 1.5, math.nan, [1.5], ["</s>"], {}, [None], -1, [-1], 10**6, [64], True)


def _train(context: Context, **changed: Any) -> Any:
    return context.train(**changed)


def _call(context: Context, **changed: Any) -> Any:
    return context.tuned(**dict(input_ids=IDS.clone()) | changed)


def _generate(context: Context, **changed: Any) -> Any:
    given = dict(input_ids=IDS[:, :3].clone(), max_new_tokens=2)
    return context.tuned.generate(**given | changed)


def _many(context: Context, **changed: Any) -> Any:
    given = dict(model=context.tuned, tokenizer=context.tokenizer, max_new_tokens=2)
    return [*fastlora.generate_many(**given | dict(prompts=["w1 w2", [1, 10]]) | changed)]


def _text(context: Context, **changed: Any) -> Any:
    given = dict(tokenizer=context.tokenizer, prompt="w1 w2", max_new_tokens=2)
    return context.tuned.generate_text(**given | changed)


def _of(function: str) -> Any:
    return lambda context, **changed: call_functional(context, function, **changed)


def _unstack(context: Context, **changed: Any) -> Any:
    tree = context.tuned.adapter
    return FL.unstack(**dict(stack=tree, models=[context.tuned]) | changed)


def cases() -> Iterator[Case]:
    """All of them."""
    data: tuple[Any, ...] = (
        None,
        5,
        "",
        "no-such.jsonl",
        "a\0b.jsonl",
        [],
        [5],
        [None],
        ["text"],
        {},
        STRANGER,
    )
    more_data = ([{}], [{"text": 5}], [{"messages": "x"}], [{"messages": []}], [{"text": ""}])
    scheduler = tuple(value for value in CHOICE if value is not STRANGER)
    train = dict(
        model=(*MODEL, "adapter"),
        tokenizer=(None, *TOKENIZER),
        data=data + more_data,
        eval_data=tuple(value for value in data if value is not None),
        output_dir=PATH,
        max_steps=(*COUNT, HUGE),
        num_epochs=(None, *POSITIVE),
        batch_size=(None, *COUNT),
        gradient_accumulation_steps=(None, *COUNT),
        learning_rate=(None, *POSITIVE, 1e39, 1e308),
        lr_scheduler=(None, *scheduler),
        warmup_ratio=(None, *SHARE),
        weight_decay=(None, *NUMBER, -1.0, 1e308),
        max_grad_norm=(*NUMBER, -1.0),
        optimizer=(None, *scheduler),
        packing=FLAG,
        train_on=(None, *CHOICE),
        eval_every=COUNT,
        save_every=COUNT,
        resume=(None, 5, 1.5, (), {}, "", "no-such", "a\0b", STRANGER, True),
        seed=(None, *SEED),
        # An empty tuple names no logger.
        log=(*(value for value in FUNCTION if value != ()), "no such logger"),
        progress=FLAG,
    )
    yield from bad_calls("train", _train, train)
    inputs = dict(
        input_ids=IDS_WRONG,
        attention_mask=MASK_WRONG + MASK_VALUES,
        position_ids=POSITIONS_WRONG,
        segment_ids=SEGMENTS_WRONG,
        seed=SEED_WRONG,
    )
    yield from bad_calls("model()", _call, inputs)
    generate = dict(
        input_ids=IDS_WRONG,
        attention_mask=MASK_WRONG,
        max_new_tokens=(None, *SIZE, 1000),
        temperature=(None, *NUMBER, -1.0),
        top_k=COUNT,
        top_p=(*NOT_NUMBERS, math.nan, 0, -0.5, 1.5, HUGE, True),
        min_p=(*NOT_NUMBERS, math.nan, -0.5, 1.5, HUGE, True),
        repetition_penalty=(None, *POSITIVE),
        eos_token_id=STOPS_WRONG,
        seed=tuple(value for value in SEED if value != ()),
        stream=FUNCTION,
        adapter_ids=([0, 0], [0], 5, "00", torch.zeros(2, dtype=torch.int64), STRANGER),
        return_logprobs=FLAG,
    )
    yield from bad_calls("generate", _generate, generate)
    lists = ([5], [None], [[]], [[-1]], [[64]], [[1.5]], [[True]], [[STRANGER]], ["\ud800"], [{}])
    many = dict(
        model=MODEL,
        prompts=(None, 5, "text", {}, STRANGER, *lists),
        tokenizer=TOKENIZER,
        max_batch=(None, *COUNT, "all", -HUGE),
        n=(None, *COUNT),
        seed=(*(value for value in SEED if value != ()), [1], [1, 2, 3], [-1, 2]),
    )
    shared = ("max_new_tokens", "min_p", "eos_token_id", "adapter_ids", "return_logprobs")
    many |= {name: generate[name] for name in shared}
    yield from bad_calls("generate_many", _many, many)
    prompts = (None, 5, {}, [], [5], ["user"], [{"content": "x"}], "\ud800", STRANGER, "")
    text = dict(tokenizer=(None, *TOKENIZER), prompt=prompts, stream=FUNCTION)
    yield from bad_calls("generate_text", _text, text | dict(eos_token_id=STOPS_WRONG))
    # functional looks at names, shapes and dtypes and never at values: those it leaves to Model.
    shaped = lambda values: tuple(v for v in values if not _is_of_values(v))
    trees = dict(
        adapter=("text", 5, (), {}, STRANGER, torch.zeros(1)),
        base=(None, "text", 5, (), {}, STRANGER, torch.zeros(1)),
        spec=(None, "text", 5, (), {}, STRANGER),
        seed=("1", (), 1.5, True, STRANGER, torch.zeros(2, dtype=torch.int64), torch.zeros(())),
    )
    optional = {name: shaped(inputs[name]) for name in ("attention_mask", "position_ids")}
    optional["segment_ids"] = shaped(SEGMENTS_WRONG)
    ids = dict(input_ids=shaped(IDS_WRONG))
    adapter_ids = dict(adapter_ids=(*TENSOR, IDS, torch.zeros(3, dtype=torch.int64)))
    yield from bad_calls("FL.forward", _of("forward"), trees | ids | optional | adapter_ids)
    labels = dict(labels=(None, *LABELS_WRONG))
    yield from bad_calls("FL.token_logprobs", _of("token_logprobs"), trees | ids | labels)
    batch = dict(batch=(None, "text", 5, (), {}, [IDS], IDS, STRANGER))
    yield from bad_calls("FL.loss", _of("loss"), trees | batch)
    yield from bad_calls("FL.row_losses", _of("row_losses"), trees | batch | adapter_ids)
    models = (None, 5, "text", (), [], [5], STRANGER)
    yield from bad_calls("FL.stack", lambda _, **how: FL.stack(**how), dict(models=models))
    stacks = dict(stack=(None, 5, "text", {}, [], STRANGER), models=models)
    yield from bad_calls("FL.unstack", _unstack, stacks)
    yield from _batches()


def _is_of_values(value: Any) -> bool:
    good = (2, 6)
    is_ids = isinstance(value, torch.Tensor) and value.dtype == torch.int64
    return is_ids and (value.shape == good or value.shape == (2, 120))


def _batches() -> Iterator[Case]:
    """Bad entries of a batch, for model.loss and FL.loss."""
    entries = dict(
        input_ids=(IDS_WRONG, "input_ids"),
        labels=((None, *LABELS_WRONG, *LABELS_VALUES), "labels"),
        attention_mask=(MASK_WRONG, "attention_mask"),
        position_ids=(POSITIONS_WRONG, "position_ids"),
        segment_ids=(SEGMENTS_WRONG, "segment_ids"),
        atention_mask=((IDS,), "atention_mask"),
        label=((IDS,), "label"),
    )
    for entry, (values, named) in entries.items():
        for i, value in enumerate(values):

            def of_model(context: Context, entry: str = entry, value: Any = value) -> Any:
                return context.tuned.loss(context.batch | {entry: value})

            def pure(context: Context, entry: str = entry, value: Any = value) -> Any:
                return call_functional(context, "loss", batch=context.batch | {entry: value})

            yield Case(f"model.loss batch[{entry}], {i}", "C14", of_model, (named,))
            if not _is_of_values(value):
                yield Case(f"FL.loss batch[{entry}], {i}", "C14", pure, (named,))
    for entry in ("input_ids", "labels"):

        def missing(context: Context, entry: str = entry) -> Any:
            return context.tuned.loss({k: v for k, v in context.batch.items() if k != entry})

        yield Case(f"model.loss batch without {entry}", "C14", missing, (entry,))
