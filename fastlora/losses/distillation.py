"""distill(): how far a model's next-token distributions are from another model's.

The divergence needs all logits of both models, [b, t, v]. They are computed in chunks of tokens,
and computed again in the backward pass, so that only one chunk exists at a time.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlora.arguments import Rule, argument_problems, number
from fastlora.errors import raise_problems
from fastlora.functional import trained_labels
from fastlora.models.decoder import dropout_key, hidden_states
from fastlora.models.head import head, logits, masked_for_head
from fastlora.models.input_checks import MODEL, check_call, entry_problems
from fastlora.models.params import Adapter, Base
from fastlora.models.self_contained import unpark_originals
from fastlora.models.spec import Spec
from fastlora.models.state import Batch, ModelState, Seed
from fastlora.ops.dispatch import transforms_active
from fastlora.ops.loss.ignore import IGNORE
from fastlora.ops.loss.linear_cross_entropy import rows_per_chunk

BETA = number(low=0, high=1)
TEMPERATURE: Rule = number(above=0)

# A chunk takes up to 11 float32 tensors of its logits, so it has a quarter of the rows of the
# supervised loss, which takes two.
_CHUNK_SHARE = 4


def divergence(
    student_logits: Float[Tensor, "n v"],
    teacher_logits: Float[Tensor, "n v"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, "n"]:
    """The generalised Jensen-Shannon divergence of each row, at least float32, in nats.

    With p of the teacher, q of the student and m = beta p + (1 - beta) q:
    beta KL(p || m) + (1 - beta) KL(q || m). beta=0 is the forward KL(p || q), and beta=1 the
    reverse KL(q || p), as in TRL's GKDTrainer (Agarwal et al. 2023, arXiv:2306.13649).

    Args:
        student_logits: any finite values.
        teacher_logits: the same.
        beta: in [0, 1].
        temperature: both logits are divided by it.

    Raises:
        ValueError: beta or temperature has another value.
    """
    rules = {"beta": (beta, BETA), "temperature": (temperature, TEMPERATURE)}
    raise_problems(
        ValueError, "losses.divergence cannot use these arguments:", argument_problems(rules)
    )
    q, p = (_log_softmax(x, temperature) for x in (student_logits, teacher_logits))
    if beta == 0:
        return _kl(p, q)
    if beta == 1:
        return _kl(q, p)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _log_softmax(x: Float[Tensor, "n v"], temperature: float) -> Float[Tensor, "n v"]:
    return (x.to(torch.promote_types(x.dtype, torch.float32)) / temperature).log_softmax(-1)


def _kl(p: Float[Tensor, "n v"], q: Float[Tensor, "n v"]) -> Float[Tensor, "n"]:
    """KL of log-probabilities, sum p (log p - log q)."""
    return (p.exp() * (p - q)).sum(-1)


def distill(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    batch: Batch,
    teacher: ModelState,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    seed: Seed = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """(sum of `divergence` over the trained tokens, their number); the teacher has no gradient.

    Beyond the hidden states of both models, peak memory is one chunk of logits: float32 tensors of
    at most 2**25 elements, 7 for a forward or reverse KL and 11 between them. Under torch.func
    every chunk is kept.

    Args:
        adapter: the student's trained tensors; None computes the base model.
        base: the student's frozen weights.
        spec: how to run them.
        batch: "input_ids", "labels", and optionally the masks and ids of `functional.forward`. Of
            the labels only -100 or not counts.
        teacher: a model with the same vocabulary. Over the same base tensors it takes no memory.
        beta: 0: forward KL, 1: reverse KL, between: Jensen-Shannon.
        temperature: logits of both are divided by it.
        seed: of the student's LoRA dropout masks; None: without dropout.

    Raises:
        ValueError: an argument has a wrong class, shape, dtype or value, or the vocabularies have
            different sizes.
    """
    rules = {
        "teacher": (teacher, MODEL), "beta": (beta, BETA),
        "temperature": (temperature, TEMPERATURE),
    }  # fmt: skip
    problems = argument_problems(rules) + entry_problems(batch)
    raise_problems(ValueError, "losses.distill cannot use these arguments:", problems)
    check_call("losses.distill", adapter, base, spec, batch, seed)
    check_vocabularies("losses.distill", spec, teacher)
    trained = F.pad(trained_labels(batch)[:, 1:] != IGNORE, (0, 1)).flatten()
    student = _Rows(adapter, base, spec, batch, seed)
    with torch.no_grad():
        other = _Rows(teacher.adapter, teacher.base, teacher.spec, batch, None)

    def chunk_sum(here: slice, *rows: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = other.logits(other.hidden[here], other.masked[here])
        student_logits = student.logits(*rows)
        each = divergence(student_logits, teacher_logits, beta=beta, temperature=temperature)
        return torch.where(trained[here], each, 0.0).sum()

    size = rows_per_chunk(_CHUNK_SHARE * spec.config.vocab_size)
    sums = []
    for first in range(0, len(trained), size):
        here = slice(first, first + size)
        rows = (student.hidden[here], student.masked[here])
        # checkpoint needs saved-tensor hooks, which torch.func refuses.
        if transforms_active() or not torch.is_grad_enabled():
            sums.append(chunk_sum(here, *rows))
        else:
            sums.append(
                checkpoint(chunk_sum, here, *rows, use_reentrant=False, preserve_rng_state=False)
            )
    return torch.stack(sums).sum(), trained.sum()


def check_vocabularies(function: str, spec: Spec, teacher: ModelState) -> None:
    """Raise a ValueError if two models' vocabularies have different sizes."""
    ours, theirs = spec.config.vocab_size, teacher.spec.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"{function}: the teacher's vocabulary has {theirs:,} ids, the student's {ours:,};"
            " expected two models with the same tokenizer."
        )


class _Rows:
    """The inputs of a model's head, one row for each token, and the head."""

    def __init__(
        self, adapter: Adapter | None, base: Base, spec: Spec, batch: Batch, seed: Seed
    ) -> None:
        # Parked originals are tensors of which the adapter has copies. Without it they are needed.
        base = base if adapter is not None else unpark_originals(base)
        names = ("attention_mask", "position_ids", "segment_ids")
        optional: dict[str, Any] = {name: batch.get(name) for name in names}
        hidden = hidden_states(adapter, base, spec, batch["input_ids"], seed=seed, **optional)
        self.spec, self.head = spec, head(adapter, base, spec)
        self.hidden = hidden.flatten(0, 1)
        key = dropout_key(spec, seed, hidden.device)
        self.masked = masked_for_head(self.hidden, self.head, spec, key)

    def logits(
        self, hidden: Float[Tensor, "n d"], masked: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n v"]:
        return logits(hidden, masked, self.head, self.spec)
