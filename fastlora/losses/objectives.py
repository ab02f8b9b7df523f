"""DPO, ORPO, KTO, SimPO, DFT, Distill: what `train(loss=...)` minimises, with its settings.

A step's loss is the sum of `loss_sum` over its micro-batches divided by the sum of
`count`, so it does not depend on how a step is split, except for KTO's baseline.
"""

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.arguments import Rule, describe, setting, setting_problems
from fastlora.data.batches import count_trained_tokens
from fastlora.errors import raise_problems
from fastlora.losses.distillation import BETA, TEMPERATURE, check_vocabularies, distill
from fastlora.losses.policy import dft
from fastlora.losses.preferences import (
    DPO_KINDS,
    LABEL_SMOOTHING,
    NOT_NEGATIVE,
    POSITIVE,
    dpo,
    kto,
    orpo,
    simpo,
    smoothing_problems,
)
from fastlora.losses.row_logprobs import batch_logprobs, row_logprobs
from fastlora.models.input_checks import MODEL
from fastlora.models.params import Adapter, Base
from fastlora.models.spec import Spec
from fastlora.models.state import Batch, ModelState, Seed

RowKind = Literal["supervised", "pairs", "labelled"]
Reference = ModelState | Literal["start"] | None

REFERENCE = Rule(
    lambda x: x is None or MODEL.accepts(x) or (type(x) is str and x == "start"),
    '"start" (the model that train is given), None (the base) or a fastlora.Model',
)


# Not slots=True: the parent's __post_init__ could not be called from a subclass.
@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """A loss with its settings.

    Raises:
        ValueError: a setting has another value than its rule allows.
    """

    rows: ClassVar[RowKind] = "supervised"
    """Which rows it needs: those of supervised training, pairs, or replies with a label."""

    def __post_init__(self) -> None:
        """Check the settings."""
        heading = f"losses.{type(self).__name__} cannot use these arguments:"
        raise_problems(ValueError, heading, setting_problems(self) + self._more_problems())

    def _more_problems(self) -> list[str]:
        """Problems with settings that depend on each other."""
        return []

    def loss_sum(
        self, adapter: Adapter, base: Base, spec: Spec, batch: Batch, seed: Seed
    ) -> Float[Tensor, ""]:
        """The sum of the losses of a micro-batch's items, differentiable in `adapter`."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """The number of items that a batch's loss is a sum over: trained tokens."""
        return count_trained_tokens(batch)

    def started_from(self, model: ModelState) -> "Objective":
        """This objective with `reference="start"` replaced by the model."""
        return self

    def models(self) -> dict[str, ModelState]:
        """The other models that the loss depends on, by the names of the settings."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in values.items() if isinstance(x, ModelState)}

    def describe(self) -> str:
        """The loss and its settings, as one line. Two runs with different lines, or with different
        tensors of `models`, are different runs."""
        shown = [(f.name, getattr(self, f.name)) for f in fields(self)]
        text = lambda x: repr(x) if isinstance(x, str | float | int | None) else describe(x)
        given = ", ".join(f"{name}={text(value)}" for name, value in shown)
        return f"{type(self).__name__.lower()}({given})"


@dataclass(frozen=True, kw_only=True, eq=False)
class _WithReference(Objective):
    """A loss that compares the policy with a frozen reference policy."""

    reference: Reference = setting(REFERENCE, "start")
    """The reference. Over the same base tensors it takes no memory: "start" is the model that
    `train` is given, None its base without adapter, and any Model may be given."""

    def started_from(self, model: ModelState) -> Objective:
        return replace(self, reference=model) if self.reference == "start" else self

    @torch.no_grad()
    def reference_logprobs(
        self, base: Base, spec: Spec, batch: Batch
    ) -> tuple[Float[Tensor, "b"], Int[Tensor, "b"]]:
        """`row_logprobs` of the reference, without dropout and gradient.

        Raises:
            ValueError: the reference is "start"; `started_from` replaces it.
        """
        reference = self.reference
        if isinstance(reference, ModelState):
            return row_logprobs(reference.adapter, reference.base, reference.spec, batch)
        if reference is None:
            return row_logprobs(None, base, spec, batch)
        raise ValueError(
            f"losses.{type(self).__name__}: reference='start' outside of train; expected"
            " objective.started_from(model), or another reference."
        )


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The values of the chosen and of the rejected replies of a batch of pairs."""
    half = len(x) // 2
    return x[:half], x[half:]


def _count_pairs(batch: Batch) -> int:
    return len(batch["input_ids"]) // 2


@dataclass(frozen=True, kw_only=True, eq=False)
class DPO(_WithReference):
    """`dpo` over pairs. With loss_type="ipo" log-probabilities are means over tokens."""

    rows: ClassVar[RowKind] = "pairs"
    beta: float = setting(POSITIVE, 0.1)
    label_smoothing: float = setting(LABEL_SMOOTHING, 0.0)
    loss_type: str = setting(DPO_KINDS, "sigmoid")

    def _more_problems(self) -> list[str]:
        return smoothing_problems(self.loss_type, self.label_smoothing)

    def loss_sum(
        self, adapter: Adapter, base: Base, spec: Spec, batch: Batch, seed: Seed
    ) -> Float[Tensor, ""]:
        logps, tokens = row_logprobs(adapter, base, spec, batch, seed=seed)
        ref_logps, _ = self.reference_logprobs(base, spec, batch)
        if self.loss_type == "ipo":
            logps, ref_logps = logps / tokens, ref_logps / tokens
        values = (*_halves(logps), *_halves(ref_logps))
        settings = dict(label_smoothing=self.label_smoothing, loss_type=self.loss_type)
        return dpo(*values, beta=self.beta, **settings).sum()  # pyright: ignore

    def count(self, batch: Batch) -> int:
        return _count_pairs(batch)


@dataclass(frozen=True, kw_only=True, eq=False)
class ORPO(Objective):
    """`orpo` over pairs, with the paper's supervised loss."""

    rows: ClassVar[RowKind] = "pairs"
    beta: float = setting(NOT_NEGATIVE, 0.1)

    def loss_sum(
        self, adapter: Adapter, base: Base, spec: Spec, batch: Batch, seed: Seed
    ) -> Float[Tensor, ""]:
        logps, tokens = row_logprobs(adapter, base, spec, batch, seed=seed)
        return orpo(*_halves(logps / tokens), beta=self.beta).sum()

    def count(self, batch: Batch) -> int:
        return _count_pairs(batch)


@dataclass(frozen=True, kw_only=True, eq=False)
class SimPO(Objective):
    """`simpo` over pairs, plus cpo_alpha times the mean of -log p of the chosen reply."""

    rows: ClassVar[RowKind] = "pairs"
    beta: float = setting(POSITIVE, 0.1)
    simpo_gamma: float = setting(NOT_NEGATIVE, 0.5)
    label_smoothing: float = setting(LABEL_SMOOTHING, 0.0)
    cpo_alpha: float = setting(NOT_NEGATIVE, 0.0)

    def loss_sum(
        self, adapter: Adapter, base: Base, spec: Spec, batch: Batch, seed: Seed
    ) -> Float[Tensor, ""]:
        logps, tokens = row_logprobs(adapter, base, spec, batch, seed=seed)
        chosen, rejected = _halves(logps / tokens)
        settings = dict(simpo_gamma=self.simpo_gamma, label_smoothing=self.label_smoothing)
        losses = simpo(chosen, rejected, beta=self.beta, **settings)
        return (losses - self.cpo_alpha * chosen).sum()

    def count(self, batch: Batch) -> int:
        return _count_pairs(batch)


@dataclass(frozen=True, kw_only=True, eq=False)
class KTO(_WithReference):
    """`kto` over replies with a label; its baseline is estimated from each micro-batch."""

    rows: ClassVar[RowKind] = "labelled"
    beta: float = setting(POSITIVE, 0.1)
    desirable_weight: float = setting(NOT_NEGATIVE, 1.0)
    undesirable_weight: float = setting(NOT_NEGATIVE, 1.0)

    def loss_sum(
        self, adapter: Adapter, base: Base, spec: Spec, batch: Batch, seed: Seed
    ) -> Float[Tensor, ""]:
        names = ("input_ids", "labels", "attention_mask")
        rows = {name: batch[name] for name in names}
        others = {name: batch[f"KL_{name}"] for name in names}
        logps, _ = row_logprobs(adapter, base, spec, rows, seed=seed)
        ref_logps, _ = self.reference_logprobs(base, spec, rows)
        with torch.no_grad():
            baseline, _ = row_logprobs(adapter, base, spec, others, seed=seed)
        ref_baseline, _ = self.reference_logprobs(base, spec, others)
        return kto(
            logps,
            ref_logps,
            batch["label"],
            KL_logps=baseline,
            ref_KL_logps=ref_baseline,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        ).sum()

    def count(self, batch: Batch) -> int:
        return len(batch["label"])


@dataclass(frozen=True, kw_only=True, eq=False)
class DFT(Objective):
    """`dft` over the trained tokens of supervised rows."""

    def loss_sum(
        self, adapter: Adapter, base: Base, spec: Spec, batch: Batch, seed: Seed
    ) -> Float[Tensor, ""]:
        logps, _ = batch_logprobs("losses.DFT", adapter, base, spec, batch, seed)
        return dft(logps).sum()


@dataclass(frozen=True, kw_only=True, eq=False)
class Distill(Objective):
    """`distill` from a teacher, over the trained tokens of supervised rows."""

    teacher: ModelState = setting(MODEL)
    beta: float = setting(BETA, 0.5)
    temperature: float = setting(TEMPERATURE, 1.0)

    def started_from(self, model: ModelState) -> Objective:
        check_vocabularies("losses.Distill", model.spec, self.teacher)
        return self

    def loss_sum(
        self, adapter: Adapter, base: Base, spec: Spec, batch: Batch, seed: Seed
    ) -> Float[Tensor, ""]:
        settings = dict(beta=self.beta, temperature=self.temperature)
        return distill(adapter, base, spec, batch, self.teacher, seed=seed, **settings)[0]
