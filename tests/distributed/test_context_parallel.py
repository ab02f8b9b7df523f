"""Rows whose tokens are on several ranks: loss, gradients and runs of one rank.

Laws in context_laws.py. float64, unless a case says another type.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastlora
from fastlora import functional as FL
from fastlora.distributed import context_parallel
from fastlora.models.context_part import context_problems, padding_problems
from fastlora.ops.attention.context_group import ContextGroup
from oracles.checkpoints import make_checkpoint
from oracles.trees import stacked

TWO: dict[str, dict[str, Any]] = {
    "plain": dict(recompute="none"),
    "plain, float32": dict(dtype="float32"),
    "packed": dict(rows="packed", recompute="full"),
    "packed, float32": dict(rows="packed", dtype="float32"),
    "padded right": dict(rows="right", recompute=0.5),
    "padded left": dict(rows="left"),
    "dropout and noise": dict(kind="dropout", rows="packed", noise=5.0),
    "dropout, padded": dict(kind="dropout", rows="right", noise=5.0),
    "DoRA under dropout": dict(kind="dora", recompute="full"),
    "trained rows": dict(kind="rows", rows="packed"),
    "sharded base": dict(shard=2, recompute="full"),
    "windows": dict(folder="mistral", rows="packed"),
    "dynamic RoPE": dict(folder="dynamic", rows="packed"),
    "experts": dict(folder="mixtral"),
    # Caps, a scale of scores, windows in some layers, norms at both ends, a scaled embedding.
    "Gemma 2": dict(folder="gemma2", rows="packed", noise=5.0, recompute="full"),
    "Gemma 2, padded left": dict(folder="gemma2", rows="left"),
    # RoPE by layer type, norms behind attention and MLP.
    "OLMo 3": dict(folder="olmo3", rows="right", recompute="selective"),
    # One projection for q, k and v; RoPE of a part of each head, which depends on the length.
    "Phi-4-mini": dict(folder="phi4_mini", kind="fused", rows="packed"),
    "Phi-4-mini, padded": dict(folder="phi4_mini", kind="fused", rows="right", noise=5.0),
    # Scaled residuals and noise.
    "Granite": dict(folder="granite", noise=5.0, rows="packed"),
    "RoPE of neighbours": dict(folder="helium"),
    "kernels": dict(rows="packed", dtype="float32", kernels="triton"),
    "kernels, windows": dict(folder="mistral", dtype="float32", kernels="triton"),
    "kernels, caps": dict(folder="gemma2", rows="packed", dtype="float32", kernels="triton"),
}
FOUR: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "packed": dict(rows="packed", dtype="float32"),
    "dropout": dict(kind="dropout", noise=5.0),
    "two groups of two": dict(rows="packed", ranks=2),
}


def largest(a: list[float], b: list[float]) -> float:
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root, found = tmp_path_factory.mktemp("context"), {}
    families = {case["folder"] for case in TWO.values() if "folder" in case}
    for family in sorted({"llama2", *families}):
        make_checkpoint(family, root / family)
        found[family] = str(root / family)
    make_checkpoint("llama2", root / "shallow", config=dict(num_hidden_layers=1))
    return found | {"shallow": str(root / "shallow")}


@pytest.fixture(scope="module")
def differences(folders, results) -> dict[int, list[dict[str, float]]]:
    """Number of ranks -> what each rank found."""
    placed = lambda cases: {
        name: case | {"folder": folders[case.get("folder", "llama2")]}
        for name, case in cases.items()
    }
    law = "context_laws.gradients"
    return {n: results(law, n, cases=placed(cases)) for n, cases in ((2, TWO), (4, FOUR))}


@pytest.mark.parametrize(("ranks", "name"), [*((2, n) for n in TWO), *((4, n) for n in FOUR)])
def test_loss_and_gradients_are_those_of_one_rank(differences, ranks, name):
    single = "float32" in (TWO if ranks == 2 else FOUR)[name].values()
    for found in differences[ranks]:
        assert found[name] < (1e-6 if single else 1e-12)


def test_the_backward_pass_gathers_again_what_it_did_not_keep(results, folders):
    for found in results("context_laws.transfers", 2, folder=folders["llama2"]):
        # Two layers; one gradient of keys and values each.
        assert found["none"] == [2, 2]
        assert found["selective"] == found["full"] == [4, 2]


def test_groups_are_of_consecutive_ranks_and_rows_come_in_order(results):
    found = results("context_laws.groups", 4)
    for rank, (in_group, ranks, same, whole) in enumerate(found):
        first = rank - rank % 2
        assert (in_group, ranks, same) == (rank % 2, 2, True)
        assert whole == [first, first + 1, first + 1, first]  # pieces 0 and 3, 1 and 2


@pytest.mark.compile
def test_compiled_layers_have_the_gather_in_their_graph(results, folders):
    for found in results("context_laws.compiled_layers", 2, folder=folders["shallow"]):
        assert max(found["none"], found["selective"]) < 1e-12
        assert found["gathers"] == 3  # both forward passes; the backward pass of "selective"


# ── train ─────────────────────────────────────────────────────────────────────────────────
RUNS: dict[str, dict[str, Any]] = {
    "packed": dict(max_steps=3, evaluates=True, eval_every=2),
    "padded, dropout, noise": dict(
        max_steps=3, packing=False, dropout=0.2, neftune_alpha=5.0, gradient_accumulation_steps=2
    ),
    "sharded base": dict(max_steps=3, packing=False, kind="odd", evaluates=True),
}


@pytest.fixture(scope="module")
def trained(gang) -> dict[int, tuple[list[dict], Any]]:
    """Number of ranks -> (results of all ranks, the folder of the job); 4 are 2 groups of 2."""
    found = {}
    for ranks in (1, 2, 4):
        cases = {name: case | dict(batch_size=4 if ranks < 4 else 2) for name, case in RUNS.items()}
        if ranks > 1:
            cases = {name: case | dict(context_parallel=2) for name, case in cases.items()}
            cases["sharded base"]["shard"] = ranks
        answer = gang("runs", ranks, cases=cases)
        assert not any(r["exit"] for r in answer["ranks"]), answer["ranks"][-1]["text"]
        found[ranks] = [rank["result"] for rank in answer["ranks"]], answer["scratch"]
    return found


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_runs_are_those_of_one_rank(trained, ranks, name):
    ((one,), folder), (many, other) = trained[1], trained[ranks]
    for rank in many:
        assert largest(rank[name]["losses"], one[name]["losses"]) < 1e-5
        assert largest(rank[name]["evals"], one[name]["evals"]) < 1e-5
        assert rank[name]["tokens"] == one[name]["tokens"]
        assert rank[name]["bits"] == many[0][name]["bits"]
    want, got = (torch.load(path / f"{name}.pt") for path in (folder, other))
    assert (want - got).abs().max() < 1e-6


# ── what is refused ───────────────────────────────────────────────────────────────────────
def test_ranks_that_do_not_divide_into_groups_are_refused(results):
    for of_function, of_train, of_two in results("context_laws.refused", 2):
        text = "context_parallel=3: the 2 ranks do not divide into groups of 3"
        assert text in of_function and text in of_train
        assert "rank 1 has another context_parallel: 2; rank 0 has 1" in of_two


def test_a_process_that_no_launcher_has_started_has_no_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="no launcher has started this process"):
        fastlora.context_group(1, "cpu")


def test_the_group_of_a_gpu_without_index_is_started_on_the_gpu_of_the_rank(monkeypatch):
    """NCCL's process group is refused without an index."""
    for name, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    def start(device: torch.device) -> None:
        raise KeyError(str(device))

    monkeypatch.setattr(context_parallel, "start_group", start)
    with pytest.raises(KeyError, match="cuda:1"):
        fastlora.context_group(2, "cuda")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(8)[None]
    return {"input_ids": ids, "labels": ids}


def test_calls_that_need_whole_rows_are_refused_by_name(tiny, batch):
    group = ContextGroup("none", 0, 2)
    model = (tiny.base, tiny.spec, batch)
    call = lambda adapter, **given: FL.loss_sum(adapter, *model, context=group, **given)[0]
    with pytest.raises(ValueError, match="adapter is a stack"):
        call(stacked([tiny.adapter] * 2))
    for name, given in (
        ("add", {"norm": torch.ones(1)}),
        ("inputs_embeds", torch.ones(1, 8, 32)),
        ("adapter_ids", torch.zeros(1, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=name):
            call(tiny.adapter, **{name: given})
    with pytest.raises(ValueError, match="per_example"):
        fastlora.value_and_grad(lambda a: call(a)[None], per_example=True)(tiny.adapter)
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.grad(call)(tiny.adapter)
    (problem,) = context_problems(tiny.adapter, SimpleNamespace(ranks=2), None, None, None)
    assert "expected the result of fastlora.context_group" in problem


def test_padding_that_is_read_or_trained_is_refused(tiny, batch):
    """Whole rows pass over such keys; the keys of a part's query are one span."""
    none = torch.full_like(batch["labels"], -100)
    mask, segments = torch.ones_like(batch["input_ids"]), torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]])
    mask[0, 3] = 0
    group, model = ContextGroup("none", 0, 2), (tiny.adapter, tiny.base, tiny.spec)
    with pytest.raises(ValueError, match="attention_mask is 0 between real tokens"):
        FL.loss_sum(*model, batch | {"attention_mask": mask}, context=group)
    assert not padding_problems(mask, segments, none)  # it is the end of a document
    mask[0, [0, 7]] = 0
    assert padding_problems(mask, None, none) and not padding_problems(mask, segments, none)
    mask[0, 5] = 0
    assert padding_problems(mask, segments, none)

    mask[0] = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0])  # before padding, padding sees itself only
    labels = torch.where(mask == 0, -100, batch["labels"])
    assert not padding_problems(mask, None, labels)
    labels[0, 5] = 1  # the last real token predicts it
    assert not padding_problems(mask, None, labels)
    labels[0, 6] = 1
    with pytest.raises(ValueError, match="labels after padding are trained"):
        call = batch | {"attention_mask": mask, "labels": labels}
        FL.loss_sum(*model, call, context=group)


def test_a_cuda_graph_is_refused(tiny, batch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="cuda_graph=True"):
        FL.loss_sum(tiny.adapter, tiny.base, tiny.spec, batch, context=ContextGroup("", 0, 2))


def test_train_names_what_it_does_not_do_together_with_context_parallel(tiny):
    given: dict[str, Any] = dict(loss="dpo", clip_per_example=1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError) as refused:
        fastlora.train(tiny, None, [], context_parallel=2, **given)
    text = str(refused.value)
    assert "context_parallel=2: this is the only rank; start several with torchrun" in text
    assert 'context_parallel=2 with a loss other than "sft"' in text
    assert "context_parallel=2 with clip_per_example" in text
    with pytest.raises(ValueError, match="context_parallel=2: several models are trained on one"):
        fastlora.train([tiny, tiny], None, [], context_parallel=2)
