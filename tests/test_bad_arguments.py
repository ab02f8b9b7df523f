"""Arguments of load and of Model's methods that are wrong are refused by name, before any work."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch

import fastlora
from fastlora.formats.gguf.methods import GGUFMethods
from fastlora.model import Model

HUGE = 10**400  # an integer that no float holds
IDS = torch.tensor([[1, 10, 11], [1, 20, 21]])


class Stranger:
    """An object of a class that nothing expects."""


STRANGER = Stranger()
NOT_A_FLAG = (None, 1, "yes", (), STRANGER)
NOT_A_NUMBER = ("1", (1,), {}, STRANGER, math.nan, math.inf, HUGE, True)
NOT_A_COUNT = ("1", (1,), {}, STRANGER, 1.5, math.nan, -1, 0, True)
NOT_A_PATH = (None, "", 5, (), 1.5, "a\0b", b"a", {}, STRANGER)
NOT_A_FUNCTION = (5, (), {}, STRANGER)
NOT_A_TOKENIZER = ("demo", 5, {}, (), STRANGER)
NOT_A_TENSOR = ("text", 5, [[1, 2]], {}, (), STRANGER)
NOT_A_SEED = ("1", (), 1.5, math.nan, -1, True, HUGE, STRANGER)
NOT_IDS = ("</s>", 1.5, [1.5], ["</s>"], {}, [None], -1, [-1], 10**6, [10**6], True, STRANGER)


class Call(NamedTuple):
    """A public function with good arguments, and wrong values of each argument."""

    function: Callable[..., Any]
    good: Mapping[str, Any]
    wrong: Mapping[str, tuple[Any, ...]]


@pytest.fixture(scope="module")
def calls(pair, tmp_path_factory) -> dict[str, Call]:
    model: Any = fastlora.lora(pair("llama2").model, r=2)
    folder, out = pair("llama2").folder, tmp_path_factory.mktemp("out") / "folder"
    demo, tokenizer = fastlora.load("demo", device="cpu")
    hub: dict[str, Any] = dict(token=(5, (), {}, STRANGER), revision=(5, (), {}, ""))
    sampling: dict[str, Any] = dict(
        temperature=(None, *NOT_A_NUMBER, "hot", -1.0),
        top_k=NOT_A_COUNT,
        top_p=(*NOT_A_NUMBER, 0, -0.5, 1.5),
        min_p=(*NOT_A_NUMBER, -0.5, 1.5),
        repetition_penalty=(None, *NOT_A_NUMBER, 0, -1.0),
        max_new_tokens=(None, *NOT_A_COUNT, 10**6),
        eos_token_id=NOT_IDS,
        seed=NOT_A_SEED,
        adapter_ids=(0, "0", [0], [0, 0], [0.5], [True], STRANGER),  # the model has no stack
    )
    batches: dict[str, Any] = dict(return_logprobs=NOT_A_FLAG, seed=(*NOT_A_SEED, [1, 2, 3], [-1]))
    masks = (*NOT_A_TENSOR, IDS[:1], IDS[0], IDS.double(), 5 * torch.ones_like(IDS))
    not_a_batch = (None, "text", 5, (), [], STRANGER, IDS)
    adapters = ("text", 5, (), [], STRANGER, torch.zeros(1), {"layers": ()})
    gguf = dict(
        tokenizer=(None, *NOT_A_TOKENIZER),
        dtype=(None, "8bit", 1, (), STRANGER),
        pre=("", 5, (), STRANGER),
    )
    return {
        "load": Call(
            fastlora.load,
            dict(model_name=folder, device="cpu"),
            dict(
                model_name=(*NOT_A_PATH, "no/such/folder", "./no-such", "x" * 5000),
                max_seq_length=NOT_A_COUNT,
                dtype=(None, 5, "no such", (), "int8", torch.int64, {}),
                load_in_4bit=NOT_A_FLAG,
                base_precision=(None, 5, "int8", "", (), True, STRANGER),
                device=(None, 5.5, (), "no such", "cpu:x", "meta", "cuda:99", {}, ""),
                rope_scaling=(5, "linear", (), STRANGER, {"rope_type": "no such"}),
                cache_dir=NOT_A_PATH[1:],
                local_files_only=NOT_A_FLAG,
                **hub,
            ),
        ),
        "with_adapter": Call(model.with_adapter, {}, dict(adapter=adapters)),
        "with_spec": Call(
            model.with_spec,
            {},
            dict(
                recompute=(None, "all", -1, 1.5, math.nan, (), {}, True, HUGE, STRANGER),
                compile=(None, "yes", 1, (), STRANGER),
                kernels=(None, "cuda", 1, (), STRANGER),
                deterministic=NOT_A_FLAG,
            ),
        ),
        "to": Call(model.to, {}, dict(device=(None, 5.5, (), "nonsense", "cuda:99", {}, ""))),
        "__call__": Call(
            model,
            dict(input_ids=IDS),
            dict(
                input_ids=(None, *NOT_A_TENSOR, IDS.float(), IDS[0], IDS - 60),
                attention_mask=masks,
                position_ids=(*NOT_A_TENSOR, IDS[:, :2], IDS.double(), IDS - 60),
                segment_ids=(*NOT_A_TENSOR, IDS[:, :2], IDS.double()),
                seed=("1", (), 1.5, True, STRANGER, torch.zeros(2)),
            ),
        ),
        "loss": Call(
            model.loss,
            dict(batch={"input_ids": IDS, "labels": IDS}),
            dict(batch=not_a_batch, seed=("1", (), 1.5, STRANGER)),
        ),
        "generate": Call(
            model.generate,
            dict(input_ids=IDS, max_new_tokens=2),
            dict(
                input_ids=(None, *NOT_A_TENSOR, IDS.float(), IDS[0], IDS - 60),
                attention_mask=masks,
                stream=NOT_A_FUNCTION,
                **sampling | batches,
            ),
        ),
        "generate_many": Call(
            fastlora.generate_many,
            dict(model=model, prompts=[[1, 10]], max_new_tokens=2),
            dict(
                model=(None, "demo", 5, (), {}, STRANGER),
                prompts=(
                    None,
                    5,
                    "text",
                    {},
                    STRANGER,
                    [5],
                    [None],
                    ["text"],
                    [[]],
                    [[-1]],
                    [[10**6]],
                    [[1.5]],
                    [[True]],
                    [[STRANGER]],
                    [[1], [[1]]],
                ),
                tokenizer=NOT_A_TOKENIZER,
                max_batch=(None, *NOT_A_COUNT, "all"),
                n=(None, *NOT_A_COUNT),
                **sampling | batches,
            ),
        ),
        "generate_text": Call(
            demo.generate_text,
            dict(tokenizer=tokenizer, prompt="a", max_new_tokens=2),
            dict(
                tokenizer=(None, *NOT_A_TOKENIZER),
                prompt=(None, 5, {}, [], [5], ["user"], [{"content": "x"}], "\ud800", STRANGER),
                stream=NOT_A_FUNCTION,
                **sampling,
            ),
        ),
        "num_parameters": Call(model.num_parameters, {}, dict(trainable=NOT_A_FLAG)),
        "save_pretrained": Call(model.save_pretrained, {}, dict(folder=NOT_A_PATH)),
        "save_pretrained_merged": Call(
            model.save_pretrained_merged,
            dict(folder=out),
            dict(
                folder=NOT_A_PATH,
                tokenizer=NOT_A_TOKENIZER,
                save_method=(None, "8bit", 1, (), STRANGER),
                base=(*NOT_A_PATH, "no such", "dequantized"),
            ),
        ),
        "save_gguf": Call(
            model.save_gguf,
            dict(path=out / "m.gguf", tokenizer=tokenizer),
            dict(path=NOT_A_PATH, verify=NOT_A_FLAG, **gguf),
        ),
        "save_gguf_adapter": Call(
            model.save_gguf_adapter,
            dict(path=out / "a.gguf"),
            dict(path=NOT_A_PATH, verify=NOT_A_FLAG),
        ),
        "save_ollama": Call(
            model.save_ollama,
            dict(folder=out, tokenizer=tokenizer),
            dict(folder=NOT_A_PATH, **gguf),
        ),
        "push_to_hub": Call(
            model.push_to_hub,
            dict(repo_id="a/b"),
            dict(
                repo_id=(None, 5, "", (), "a/b/c", "a b", "../x", "a\0b", {}, STRANGER),
                token=(5, (), {}, STRANGER),
                private=("yes", 1, (), STRANGER),
            ),
        ),
    }


FUNCTIONS = ["load", "with_adapter", "with_spec", "to", "__call__", "loss", "generate"]
FUNCTIONS += ["generate_text", "num_parameters", "save_pretrained", "save_pretrained_merged"]
FUNCTIONS += ["push_to_hub", "generate_many", "save_gguf", "save_gguf_adapter", "save_ollama"]


def refusal(call: Call, name: str, value: Any) -> Exception:
    """The error of a call with one wrong argument, which must be of ours and come at once."""
    start = time.process_time()
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as refused:
        call.function(**{**call.good, name: value})
    assert time.process_time() - start < 1, (name, value)
    return refused.value


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_wrong_argument_is_named_at_once(function, calls):
    call = calls[function]
    for name, values in call.wrong.items():
        for value in values:
            assert name in str(refusal(call, name, value)), (name, value)
    assert not (out := calls["save_pretrained_merged"].good["folder"]).exists(), out


def test_the_table_holds_every_public_method(calls):
    methods = {
        name
        for name, value in (vars(GGUFMethods) | vars(Model)).items()
        if callable(value) and (name == "__call__" or not name.startswith("_"))
    }
    without_arguments = {"for_training", "for_inference", "print_trainable_parameters"}
    others = {"load", "generate_many"}
    assert methods - without_arguments == set(FUNCTIONS) - others == set(calls) - others


def test_several_wrong_arguments_are_listed_together(calls):
    with pytest.raises((ValueError, TypeError), match=r"model_name(.|\n)*dtype(.|\n)*device"):
        fastlora.load("", dtype="int8", device="cuda:99")
