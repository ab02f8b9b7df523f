"""Bad calls of lora, merge, combine, disable, quantize and initialize."""

from collections.abc import Iterator
from typing import Any

import fastlora
from faults.case import Case, Context, tuned, without
from faults.values import (
    CHOICE,
    COUNT,
    FLAG,
    HUGE,
    MODEL,
    NAMES,
    NUMBER,
    PATH,
    POSITIVE,
    SEED,
    SHARE,
    SIZE,
    STRANGER,
    bad_calls,
)

_PATTERN = (5, "q_proj", (), {"q_proj": "4"}, {"q_proj": None}, {5: 2}, {"no_such": 2}, STRANGER)
_LAYERS = ("0", 1.5, {}, [-1], [99], ["0"], [True], [HUGE], -1, 99, STRANGER)
_ROWS = (5, "text", [-1], [99], [1.5], ["</s>"], [True], [HUGE], {"lm_head": 5}, {"no_such": [1]})


def _lora(context: Context, **changed: Any) -> Any:
    return fastlora.lora(**dict(model=context.model, r=2) | changed)


def _combine(context: Context, **changed: Any) -> Any:
    models = [context.tuned, tuned(context.model, 1)]
    return fastlora.combine(**dict(models=models, weights=[0.5, 0.5], method="cat") | changed)


def _ties(context: Context, **changed: Any) -> Any:
    return _combine(context, **dict(method="ties", density=0.5) | changed)


def _svd(context: Context, **changed: Any) -> Any:
    return _combine(context, **dict(method="svd", svd_rank=2) | changed)


def _dare(context: Context, **changed: Any) -> Any:
    return _combine(context, **dict(method="dare_linear", density=0.5, seed=1) | changed)


def _initialize(context: Context, **changed: Any) -> Any:
    given: dict[str, Any] = dict(batches=[context.batch], method="eva")
    return fastlora.initialize(**dict(model=fastlora.lora(context.model, r=2)) | given | changed)


def _corda(context: Context, **changed: Any) -> Any:
    return _initialize(context, **dict(method="corda") | changed)


def _lora_ga(context: Context, **changed: Any) -> Any:
    return _initialize(context, **dict(method="lora_ga") | changed)


def _of_model(function: Any) -> Any:
    return lambda context, **changed: function(**dict(model=context.tuned) | changed)


def _bad_batches(context: Context) -> Iterator[tuple[str, Any]]:
    ids, labels = context.batch["input_ids"], context.batch["labels"]
    yield "no batch", []
    yield "a dict", context.batch
    yield "a misspelt entry", [context.batch | {"atention_mask": labels}]
    yield "no ids", [without(context.batch, "input_ids")]
    yield "float ids", [{"input_ids": ids.float(), "labels": labels}]
    yield "ids beyond", [{"input_ids": ids + 60, "labels": labels}]
    yield "negative ids", [{"input_ids": ids - 60, "labels": labels}]
    yield "labels transposed", [{"input_ids": ids, "labels": labels.T.contiguous()}]
    yield "a list of lists", [{"input_ids": ids.tolist(), "labels": labels}]
    yield "labels beyond", [{"input_ids": ids, "labels": labels + 1000}]


def cases() -> Iterator[Case]:
    """All of them."""
    lora = dict(
        model=MODEL,
        r=(None, *SIZE),
        target_modules=NAMES,
        lora_alpha=(None, *NUMBER),
        lora_dropout=(None, *SHARE),
        bias=(None, *CHOICE),
        layers_to_transform=_LAYERS,
        layers_pattern=(5, {}, [1], STRANGER, "no_such"),
        use_gradient_checkpointing=(5, "yes", (), {}, 1.5, STRANGER),
        random_state=(None, *SEED),
        max_seq_length=(*COUNT, HUGE),
        use_rslora=FLAG,
        modules_to_save=(5, "no_such", ["no_such"], [1], {"lm_head": 1}, STRANGER),
        init_lora_weights=(None, 5, "no such", (), {}, "pissa_niter_x", "pissa_niter_-1", STRANGER),
        loftq_config=(5, "x", (), {"loftq_bits": 3}, {"no_such": 1}, STRANGER),
        temporary_location=PATH,
        qat_scheme=(5, "no such", (), {}, "", STRANGER),
        target_parameters=(5, {}, [1], ["no_such"], STRANGER),
        ensure_weight_tying=FLAG,
        recompute=(None, "all", -1, 2, 1.5, float("nan"), (), {}, HUGE),
        use_dora=FLAG,
        lora_bias=FLAG,
        rank_pattern=(*_PATTERN, {"q_proj": 1.5}, {"q_proj": 0}, {"q_proj": HUGE}),
        alpha_pattern=(*_PATTERN, {"q_proj": float("nan")}, {"q_proj": HUGE}),
        exclude_modules=(5, {"q_proj": 1}, [1], STRANGER, "("),
        finetune_last_n_layers=(*COUNT, 99),
        trainable_token_indices=_ROWS,
        adapter_dtype=(None, 5, "no such", (), "int8", {}, ""),
    )
    yield from bad_calls("lora", _lora, lora)
    for name in ("merge", "disable", "quantize"):
        yield from bad_calls(name, _of_model(getattr(fastlora, name)), dict(model=MODEL))
    models = (None, 5, "demo", [], [5], ["demo"], [None], {}, STRANGER)
    weights = (None, 5, "x", [], [1], ["a", "b"], [float("nan")] * 2, [HUGE, 1], [None] * 2, {})
    yield from bad_calls(
        "combine",
        _combine,
        dict(models=models, weights=weights, method=(None, *CHOICE)),
    )
    yield from bad_calls(
        "combine.ties",
        _ties,
        dict(density=(*POSITIVE, 1.5), majority_sign_method=(None, *CHOICE)),
    )
    yield from bad_calls("combine.svd", _svd, dict(svd_rank=COUNT))
    yield from bad_calls("combine.dare", _dare, dict(seed=SEED))
    not_batches = (None, 5, "x", [5], ["x"], [None], STRANGER)
    yield from bad_calls(
        "initialize",
        _initialize,
        dict(
            model=MODEL,
            batches=not_batches,
            method=(None, *CHOICE),
            rho=POSITIVE,
            tau=(*NUMBER, -1.0),
        )
        | dict(use_label_mask=FLAG, whiten=FLAG, adjust_scaling_factors=FLAG)
        | dict(random_state=(None, *SEED)),
    )
    yield from bad_calls("initialize.corda", _corda, dict(corda_method=(None, *CHOICE)))
    yield from bad_calls(
        "initialize.lora_ga",
        _lora_ga,
        dict(direction=(None, *CHOICE), scale=(None, *CHOICE), stable_gamma=POSITIVE),
    )
    names = [name for name, _ in _bad_batches(_Empty())]
    for method in ("eva", "lora_ga"):
        for name in names:
            if method == "eva" and name.startswith("labels"):
                continue

            def bad(context: Context, method: str = method, name: str = name) -> Any:
                batches = dict(_bad_batches(context))[name]
                return _initialize(context, method=method, batches=batches)

            yield Case(f"initialize {method}, {name}", "C14", bad, ("batch",))


class _Empty(Context):
    """A context without folders, to list the names of the bad batches."""

    def __init__(self) -> None:
        """Nothing is made."""
