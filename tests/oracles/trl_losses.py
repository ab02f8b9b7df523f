"""How far fastlora's losses are from those of TRL's trainers, on the same log-probabilities.

    pip install --no-deps --target SITE trl==1.16.0 datasets pyarrow pandas dill xxhash multiprocess
    PYTHONPATH=.:tests:SITE python -m oracles.trl_losses

Calls the methods of TRL's trainers without a trainer: `self` is an object with the attributes that
the method reads, and its model returns our log-probabilities. Prints the largest differences of the
loss and of its gradient by the log-probabilities, in float32, and exits with 1 above 1e-5. CI runs
tests/losses/test_preferences.py in its place, because TRL needs 200 MB of packages.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import trl
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import nanstd

from fastlora import losses

TOLERANCE = 1e-5
PAIRS, LENGTH, PROMPT = 4, 12, 3
LABEL = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool()
Case = tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return -scale * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# Of each row the tokens from PROMPT on are the reply, which ends at different places.
MASK = torch.arange(LENGTH) >= PROMPT
MASK = (MASK & (torch.arange(LENGTH) < torch.tensor([12, 9, 7, 12, 5, 10, 12, 8])[:, None])).long()
TRAINED = MASK[:, 1:]
TOKENS = TRAINED.sum(1)
REF = random(2 * PAIRS, LENGTH - 1, seed=1) * TRAINED
OWN = random(2 * PAIRS, LENGTH - 1, seed=2) * TRAINED


def trainer(**given: Any) -> MagicMock:
    """A `self` for TRL's methods."""
    stub = MagicMock()
    stub.accelerator.gather_for_metrics = stub.accelerator.gather = lambda x: x
    stub.accelerator.reduce = lambda x, reduction: x
    stub.accelerator.device, stub.accelerator.num_processes = torch.device("cpu"), 1
    usual = dict(aux_loss_enabled=False, ld_alpha=None, use_weighting=False, _tp_size=1)
    usual |= dict(_total_train_tokens=0, precompute_ref_logps=True, label_smoothing=0.0)
    for name, value in (usual | given).items():
        setattr(stub, name, value)
    return stub


def returns(log_probs: Tensor) -> Callable[..., Any]:
    """A model whose log-probabilities are these."""
    zeros = torch.zeros_like(log_probs)
    outputs = dict(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **inputs: SimpleNamespace(**outputs, label_mask=TRAINED)


INPUTS = dict(
    input_ids=torch.zeros(2 * PAIRS, LENGTH, dtype=torch.long),
    attention_mask=torch.ones(2 * PAIRS, LENGTH),
    completion_mask=MASK,
)


def dpo_cases() -> Iterator[Case]:
    for kind in ("sigmoid", "hinge", "ipo"):
        stub = trainer(
            beta=0.3, loss_types=[kind], loss_weights=[1.0], f_divergence_type="reverse_kl"
        )
        ref = REF.sum(1)
        inputs = INPUTS | dict(ref_chosen_logps=ref[:PAIRS], ref_rejected_logps=ref[PAIRS:])
        divide = TOKENS if kind == "ipo" else torch.ones_like(TOKENS)

        def ours(own: Tensor, kind: str = kind, divide: Tensor = divide, ref: Tensor = ref):
            halves = [*(own.sum(1) / divide).chunk(2), *(ref / divide).chunk(2)]
            return losses.dpo(*halves, beta=0.3, loss_type=kind).mean()

        def theirs(own: Tensor, stub: Any = stub, inputs: Any = inputs):
            return DPOTrainer._compute_loss(stub, returns(own), inputs, False)

        yield f"dpo, {kind}", ours, theirs, OWN


def kto_cases() -> Iterator[Case]:
    weights = dict(beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    for name, shift in (("baseline 0", -2.0), ("baseline above 0", 2.0)):
        other, ref_other = random(8, seed=5) + shift, random(8, seed=6)
        stub = trainer(loss_type="kto", calculate_KL=True, **weights)
        stub._compute_kl_logps = lambda model, batch, other=other: other
        inputs = INPUTS | dict(label=LABEL, ref_logps=REF.sum(1), ref_KL_logps=ref_other)

        def ours(own: Tensor, other: Tensor = other, ref_other: Tensor = ref_other):
            kl = dict(KL_logps=other, ref_KL_logps=ref_other)
            return losses.kto(own.sum(1), REF.sum(1), LABEL, **kl, **weights).mean()

        def theirs(own: Tensor, stub: Any = stub, inputs: Any = inputs):
            return KTOTrainer._compute_loss(stub, returns(own), inputs, False)

        yield f"kto, {name}", ours, theirs, OWN
    stub = trainer(loss_type="apo_zero_unpaired", calculate_KL=False, **weights)
    inputs = INPUTS | dict(label=LABEL, ref_logps=REF.sum(1))
    ours = lambda own: losses.kto(own.sum(1), REF.sum(1), LABEL, **weights).mean()
    theirs = lambda own: KTOTrainer._compute_loss(stub, returns(own), inputs, False)
    yield "kto, no baseline", ours, theirs, OWN


def means(own: Tensor) -> tuple[Tensor, ...]:
    return (own.sum(1) / TOKENS).chunk(2)


def reference_free_cases() -> Iterator[Case]:
    def orpo(own: Tensor) -> Tensor:
        chosen, rejected = means(own)
        return -chosen.mean() - ORPOTrainer.odds_ratio_loss(stub, chosen, rejected)[0].mean()

    stub = trainer(beta=0.4)
    yield "orpo", lambda own: losses.orpo(*means(own), beta=0.4).mean(), orpo, OWN
    for smoothing in (0.0, 0.2):
        settings = dict(beta=2.0, simpo_gamma=0.7, label_smoothing=smoothing)
        cpo = trainer(loss_type="simpo", alpha=0.0, **settings)
        yield (
            f"simpo, label_smoothing {smoothing}",
            lambda own, settings=settings: losses.simpo(*means(own), **settings).mean(),
            lambda own, cpo=cpo: CPOTrainer.cpo_loss(cpo, *means(own))[0].mean(),
            OWN,
        )


def dft_cases() -> Iterator[Case]:
    stub = trainer(maybe_activation_offload_context=nullcontext())
    stub.args = SimpleNamespace(
        loss_type="dft", label_smoothing_factor=0.0, average_tokens_across_devices=False
    )
    stub.compute_loss_func = None
    theirs = lambda own: SFTTrainer.compute_loss(
        stub, returns(own), INPUTS | dict(labels=INPUTS["input_ids"])
    )
    yield "dft", lambda own: losses.dft(own).sum() / TRAINED.sum(), theirs, OWN


def grpo_cases() -> Iterator[Case]:
    old, ref = OWN + 0.4 * random(*OWN.shape, seed=7) + 0.2, REF
    advantages = random(8, seed=8, scale=4.0) + 2
    reply = dict(
        prompt_ids=torch.zeros(8, 1, dtype=torch.long), prompt_mask=torch.ones(8, 1),
        completion_ids=torch.zeros(8, LENGTH - 1, dtype=torch.long), advantages=advantages,
        completion_mask=TRAINED.float(), old_per_token_logps=old, ref_per_token_logps=ref,
        num_items_in_batch=torch.tensor(91.0),
    )  # fmt: skip
    for kind in ("grpo", "bnpo", "dapo", "dr_grpo"):
        stub = trainer(
            top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.04, loss_type=kind,
            importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.28, use_vllm=False,
            current_gradient_accumulation_steps=1, max_completion_length=16,
            _entropy_bonus_enabled=False,
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        )  # fmt: skip

        def theirs(own: Tensor, stub: Any = stub):
            logps = (own, torch.zeros_like(own), None)
            stub._get_per_token_logps_and_entropies = lambda *args, **settings: logps
            return GRPOTrainer._compute_loss(stub, None, reply)

        settings = dict(loss_type=kind, epsilon=0.2, epsilon_high=0.28, beta=0.04, ref_logps=ref)
        settings |= dict(max_completion_length=16, num_items_in_batch=91)
        ours = lambda own, settings=settings: losses.grpo(
            own, old, advantages, TRAINED.bool(), **settings
        )
        yield kind, ours, theirs, OWN


def distillation_cases() -> Iterator[Case]:
    teacher, student = random(6, 11, seed=9, scale=5.0), random(6, 11, seed=10, scale=5.0)
    for beta in (0.0, 0.3, 1.0):
        settings = dict(beta=beta, temperature=1.7)
        yield (
            f"distill, beta {beta}",
            lambda x, settings=settings: losses.divergence(x, teacher, **settings).mean(),
            lambda x, settings=settings: GKDTrainer.generalized_jsd_loss(x, teacher, **settings),
            student,
        )


def advantage_cases() -> Iterator[Case]:
    """TRL computes advantages within a long method; this repeats its lines, with its `nanstd`."""
    rewards = random(3, 5, seed=11)
    for kind in ("group", "batch"):
        std = lambda x, kind=kind: nanstd(x, dim=1)[:, None] if kind == "group" else nanstd(x)
        theirs = lambda x, std=std: (x - x.mean(1, keepdim=True)) / (std(x) + 1e-4)
        ours = lambda x, kind=kind: losses.group_advantages(x, scale_rewards=kind)
        square = lambda fn: lambda x: fn(x).square().sum()
        yield f"advantages, {kind}", square(ours), square(theirs), rewards


def main() -> None:
    families = (
        dpo_cases, kto_cases, reference_free_cases, dft_cases, grpo_cases, advantage_cases,
        distillation_cases,
    )  # fmt: skip
    print(f"trl {trl.__version__}, torch {torch.__version__}")
    wrong = 0
    for name, ours, theirs, point in (case for family in families for case in family()):
        results = []
        for fn in (ours, theirs):
            leaf = point.clone().requires_grad_()
            value = fn(leaf)
            results.append((value.detach(), *torch.autograd.grad(value, leaf)))
        assert results[1][1].any(), name
        value, gradient = ((a - b).abs().max().item() for a, b in zip(*results, strict=True))
        wrong += max(value, gradient) > TOLERANCE
        print(f"{name:28} {results[0][0].item():9.5f}  loss {value:.1e}  gradient {gradient:.1e}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
