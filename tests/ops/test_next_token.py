"""The ends of a decode step: kernels (in Triton's interpreter), torch and a Python loop agree."""

import math

import pytest
import torch
from torch import Tensor

from fastlora.ops.decode.next_token import chosen_logprobs, step_inputs, take_tokens
from fastlora.ops.decode.token_rows import LARGEST_LOGIT, LOGPROB, NO_TOKEN, TOKEN, TokenRows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = math.inf, math.nan
STEPS = 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(b: int, v: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (4 * torch.randn(b, v, generator=generator(seed))).to(DEVICE, dtype)


def random_rows(b: int, v: int, stops: int = 3, slots: int | None = None) -> TokenRows:
    """Rows of which some do not run and some reach their limits; views of the state of `slots`."""
    slots, gen = b if slots is None else slots, generator(1)
    whole = lambda high, *shape: torch.randint(0, high, shape, generator=gen).to(DEVICE)
    made = whole(3, slots)
    stop = torch.where(whole(3, slots, stops) > 0, whole(v, slots, stops), NO_TOKEN)
    report = torch.full((STEPS, 3, slots), -7.0, dtype=torch.float64, device=DEVICE)
    return TokenRows(
        token=whole(v, slots)[:b],
        lengths=whole(100, slots)[:b],
        made=made[:b],
        limit=(made + 1 + whole(3, slots))[:b],
        running=(whole(4, slots) > 0)[:b],
        stop=stop[:b],
        report=report[..., :b],
        cursor=torch.full((slots,), 2, device=DEVICE)[:b],
    )


def copied(rows: TokenRows) -> TokenRows:
    return TokenRows(*(x.clone() for x in rows))


def likeliest(logits: list[float]) -> int:
    """As torch.argmax is documented: NaN counts as the largest, and the first of equals wins."""
    best = 0
    for i, x in enumerate(logits):
        if not math.isnan(logits[best]) and (math.isnan(x) or x > logits[best]):
            best = i
    return best


def by_loop(logits: Tensor, rows: TokenRows, candidates: Tensor | None) -> TokenRows:
    """The new state by a Python loop, without log-probabilities."""
    new = copied(rows)
    for i, values in enumerate(logits.double().tolist()):
        best = likeliest(values)
        new.report[int(rows.cursor[i]), LARGEST_LOGIT, i] = values[best]
        new.report[int(rows.cursor[i]), TOKEN, i] = NO_TOKEN
        new.cursor[i] += 1
        if not rows.running[i]:
            continue
        token = best if candidates is None else int(candidates[i])
        new.report[int(rows.cursor[i]), TOKEN, i] = new.token[i] = token
        new.lengths[i] += 1
        new.made[i] += 1
        ended = token in rows.stop[i].tolist() or new.made[i] == rows.limit[i]
        new.running[i] = not ended
    return new


def assert_same(actual: TokenRows, expected: TokenRows) -> None:
    for name, a, e in zip(TokenRows._fields, actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "v"), [(1, 1), (1, 3001), (3, 1024), (5, 4099), (32, 97)])
def test_tokens_and_state_are_those_of_a_python_loop(b, v, dtype, kernels):
    """For three steps, so that rows end by limits and stop ids; with and without given tokens."""
    steps = [random_logits(b, v, dtype, seed=i) for i in range(3)]
    for candidates in (None, torch.arange(b, device=DEVICE) % v):
        rows = random_rows(b, v)
        second = steps[1].argmax(-1) if candidates is None else candidates
        rows.stop[::2, 1] = second[::2]
        for logits in steps:
            expected = by_loop(logits, rows, candidates)
            take_tokens(logits, rows, candidates, kernels=kernels)
            assert_same(rows, expected)
        assert b < 3 or not rows.running.all()


SPECIAL = {
    "ties": [1.0, 5.0, 5.0, 2.0, 5.0],
    "zeros of both signs": [-0.0, 0.0, -1.0],
    "negative zero is the largest": [-3.0, -0.0, 0.0],
    "negative": [-5.0, -2.0, -2.5],
    "NaN": [1.0, NAN, INF, NAN],
    "negative NaN": [1.0, -NAN, 3.0],
    "infinite": [1.0, INF, 2.0, INF],
    "one is finite": [-INF, -INF, -3.0, -INF],
    "only -inf": [-INF, -INF, -INF],
    "only NaN": [NAN, NAN],
    "tiny": [1e-45, 0.0, 2e-45],
    "far below zero": [-200.0, -199.0],
    "huge": [3e38, -3e38, 3.1e38],
}


@pytest.mark.parametrize("at", [0, 1000, 1022])  # the last one crosses two blocks
@pytest.mark.parametrize("name", SPECIAL)
def test_special_logits(name, at):
    """Anywhere in a row of -inf, so that other blocks hold -inf only."""
    values = torch.tensor(SPECIAL[name], device=DEVICE)
    logits = torch.full((2, 2100), -INF, device=DEVICE)
    logits[:, at : at + len(values)] = values
    rows = random_rows(2, 2100)
    rows.running[0], rows.running[1] = True, False
    expected = by_loop(logits, rows, None)
    plain = copied(rows)
    take_tokens(logits, rows, logprobs=True, kernels="triton")
    take_tokens(logits, plain, logprobs=True, kernels="torch")
    expected.report[2, LOGPROB] = plain.report[2, LOGPROB]
    assert_same(plain, expected)
    logprobs = rows.report[2, LOGPROB].clone()
    rows.report[2, LOGPROB] = plain.report[2, LOGPROB]
    assert_same(rows, expected)
    plainly = plain.report[2, LOGPROB]  # float32 rounds a sum of logits near -200 to 2e-5
    torch.testing.assert_close(logprobs, plainly, rtol=1e-6, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "v"), [(1, 5000), (3, 33), (6, 9001)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_kernel_errs_no_more_than_the_reference(b, v, dtype, scale):
    """Log-probabilities of likely and of unlikely tokens, against float64."""
    logits = (random_logits(b, v, torch.float32) * scale).to(dtype)
    for candidates in (None, torch.arange(b, device=DEVICE) % v):
        token = logits.argmax(-1) if candidates is None else candidates
        exact, plain = (chosen_logprobs(x, token).double() for x in (logits.double(), logits))
        rows = random_rows(b, v)
        rows.running.fill_(True)
        take_tokens(logits, rows, candidates, logprobs=True, kernels="triton")
        assert rows.token.equal(token)
        allowed = (plain - exact).abs() + 4 * torch.finfo(torch.float32).eps * exact.abs().clamp(1)
        excess = ((rows.report[2, LOGPROB] - exact).abs() - allowed).max().item()
        assert excess <= 0, f"kernel errs {excess:.1e} more than plain torch"


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_row_that_does_not_run_reports_its_newest_tokens_log_probability(kernels):
    """As engine.py never reads it, but a report has the same contents through both."""
    logits, rows = random_logits(3, 50, torch.float32), random_rows(3, 50)
    rows.running.fill_(False)
    token = rows.token.clone()
    take_tokens(logits, rows, logprobs=True, kernels=kernels)
    expected = chosen_logprobs(logits, token).double()
    torch.testing.assert_close(rows.report[2, LOGPROB], expected, rtol=1e-6, atol=1e-6)
    assert (rows.report[2, TOKEN] == NO_TOKEN).all() and rows.token.equal(token)


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_only_the_first_slots_are_changed(kernels):
    """The state of 4 of 7 slots, and no entry of the report but the cursor's."""
    whole, logits = random_rows(7, 40), random_logits(4, 40, torch.float32)
    part = TokenRows(*(x[..., :4] if x.ndim == 3 else x[:4] for x in whole))
    before = copied(whole)
    expected = by_loop(logits, copied(part), None)
    take_tokens(logits, part, kernels=kernels)
    assert_same(part, expected)
    for name, new, old in zip(TokenRows._fields, whole, before, strict=True):
        rest = (new[..., 4:], old[..., 4:]) if new.ndim == 3 else (new[4:], old[4:])
        assert torch.equal(*rest), name
    others = [i for i in range(STEPS) if i != 2]
    assert whole.report[others].eq(-7.0).all() and whole.report[:, LOGPROB].eq(-7.0).all()


def test_float64_takes_the_reference():
    logits, rows = random_logits(2, 20, torch.float64), random_rows(2, 20)
    expected = by_loop(logits, rows, None)
    take_tokens(logits, rows, kernels="triton")
    assert_same(rows, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "d", "hd"), [(1, 64, 16), (3, 2100, 24), (32, 16, 128)])
def test_inputs_are_rows_of_the_tables(b, d, hd, dtype):
    v, s = 50, 40
    new = lambda *shape: torch.randn(*shape, generator=generator()).to(DEVICE, dtype)
    embedding, cos, sin = new(v, d), new(s, hd), new(s, hd) + 1
    token = torch.randint(0, v, (b,), generator=generator(1)).to(DEVICE)
    lengths = torch.randint(0, s, (b,), generator=generator(2)).to(DEVICE)
    for kernels in ("triton", "torch"):
        found = step_inputs(token, lengths, embedding, cos, sin, kernels=kernels)
        for i in range(b):
            assert found.x[i].equal(embedding[int(token[i])])
            assert found.cos[i].equal(cos[int(lengths[i])])
            assert found.sin[i].equal(sin[int(lengths[i])])
        if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter truncates
            continue
        scaled = step_inputs(token, lengths, embedding, cos, sin, 5.5, kernels=kernels)
        assert scaled.x.equal(embedding[token] * 5.5) and scaled.cos.equal(found.cos)
