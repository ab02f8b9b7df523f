"""The arguments of train(): each setting with its rule, and the checks that run before any work."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fastlora.arguments import (
    FLAG,
    PATH,
    RANDOM_SEED,
    Rule,
    argument_problems,
    instance,
    number,
    one_of,
    optional,
    setting,
    setting_problems,
    whole_number,
)
from fastlora.data.encoding import ON_BAD_ROW
from fastlora.data.examples import TRAIN_ON, Example
from fastlora.data.long_rows import TOO_LONG
from fastlora.data.row_forms import COLUMNS
from fastlora.data.sources import DATA
from fastlora.distributed.mesh import group_problem
from fastlora.errors import raise_problems
from fastlora.formats.peft.base_tensors import base_problem
from fastlora.formats.peft.names import named_leaves
from fastlora.formats.peft.writing import adapter_folder_error
from fastlora.losses.loss_argument import LOSS, loss_problems
from fastlora.losses.objectives import Objective
from fastlora.losses.preference_rows import Labelled, Pair
from fastlora.models.input_checks import MODEL, autocast_problems
from fastlora.models.stacks import one_adapter_problems
from fastlora.models.state import ModelState
from fastlora.ops.dispatch import refuse_transforms
from fastlora.text.chat_template import TEMPLATE_KWARGS, template_kwargs_problem
from fastlora.text.tokenizer import TOKENIZER, Tokenizer
from fastlora.training.custom_optimizer import OptimizerFactory
from fastlora.training.logging.open import LOG, log_problems
from fastlora.training.mask_memory import large_mask
from fastlora.training.offload_memory import large_offload
from fastlora.training.optimizers import OPTIMIZERS, optimizer_problems
from fastlora.training.parameter_groups import RATES, rates_problems, unused_rates
from fastlora.training.private_checks import private_problems
from fastlora.training.samples import SAMPLE_PROMPTS, sample_problems
from fastlora.training.schedules import SCHEDULERS, Schedule, schedule_problems

_COUNT = whole_number(1, 2**31)
_MOST_EPOCHS = 1e9  # times fewer than 2**31 steps an epoch: the number of steps fits into int64
_LARGEST_FLOAT32 = 3.4e38  # rounded down: larger numbers are infinity in the optimizer's kernels
_RATE = number(above=0, high=_LARGEST_FLOAT32)


def _name_or_function(*names: str) -> Rule:
    """Rule: one of these names, or a function."""
    name = one_of(*names)
    return Rule(lambda x: name.accepts(x) or callable(x), f"{name.expected}, or a function")


_OPTIMIZER = _name_or_function(*OPTIMIZERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of `train` that are numbers and choices, under the same names."""

    max_steps: int | None = setting(optional(_COUNT))
    num_epochs: float = setting(number(above=0, high=_MOST_EPOCHS))
    batch_size: int = setting(_COUNT)
    gradient_accumulation_steps: int = setting(_COUNT)
    learning_rate: float = setting(_RATE)
    learning_rates: Mapping[str, float] | None = setting(optional(RATES))
    lr_scheduler: str | Schedule = setting(_name_or_function(*SCHEDULERS))
    lr_scheduler_kwargs: Mapping[str, Any] | None = setting(optional(instance(Mapping, "a dict")))
    warmup_ratio: float = setting(number(low=0, high=1))
    weight_decay: float = setting(number(low=0, high=_LARGEST_FLOAT32))
    max_grad_norm: float | None = setting(
        Rule(
            optional(number(low=0, high=_LARGEST_FLOAT32)).accepts,
            f"a number in (0, {_LARGEST_FLOAT32:g}]; or None or 0 for no clipping",
        )
    )
    optimizer: str | OptimizerFactory = setting(_OPTIMIZER)
    neftune_alpha: float | None = setting(optional(_RATE))
    loss: str | Objective | Callable[..., Any] = setting(LOSS)
    packing: bool = setting(FLAG)
    train_on: str = setting(TRAIN_ON)
    too_long: str = setting(TOO_LONG)
    on_bad_row: str = setting(ON_BAD_ROW)
    columns: Mapping[str, str] | None = setting(optional(COLUMNS))
    template_kwargs: Mapping[str, Any] | None = setting(optional(TEMPLATE_KWARGS))
    eval_every: int | None = setting(optional(_COUNT))
    sample_prompts: Sequence[Any] | None = setting(optional(SAMPLE_PROMPTS))
    sample_tokens: int = setting(_COUNT)
    save_every: int | None = setting(optional(_COUNT))
    keep: int | None = setting(optional(_COUNT))
    keep_best: bool = setting(FLAG)
    early_stopping: int | None = setting(optional(_COUNT))
    clip_per_example: float | None = setting(optional(_RATE))
    noise_multiplier: float | None = setting(optional(number(low=0, high=1e6)))
    context_parallel: int = setting(_COUNT)
    seed: int = setting(RANDOM_SEED)


HEADING = "fastlora.train cannot use these arguments:"

_RESUME = Rule(
    lambda x: FLAG.accepts(x) or PATH.accepts(x),
    'True, False, "auto" or the path of a checkpoint',
)


def check_train_arguments(settings: Settings, **arguments: Any) -> None:
    """Check every argument of `train` before any work is done or file written.

    The arguments are those of `train_problems`.

    Raises:
        ValueError: listing every argument that `train` cannot use, with what is expected.
        ModuleNotFoundError: bitsandbytes or an extra that `log` names is not installed.
    """
    refuse_transforms("fastlora.train")
    raise_problems(ValueError, HEADING, train_problems(settings, **arguments), shown=20)


def train_problems(
    settings: Settings,
    *,
    model: Any,
    tokenizer: Any,
    data: Any,
    eval_data: Any,
    output_dir: Any,
    resume: Any,
    log: Any,
    progress: Any,
) -> list[str]:
    """A line for each argument that `train` cannot use, with what is expected.

    Raises:
        ModuleNotFoundError: bitsandbytes or an extra that `log` names is not installed.
    """
    # All problems are collected first, so that one error names them all.
    problems = setting_problems(settings)
    problems += argument_problems(
        {
            "model": (model, MODEL),
            "tokenizer": (tokenizer, TOKENIZER),
            "data": (data, DATA),
            "eval_data": (eval_data, optional(DATA)),
            "output_dir": (output_dir, optional(PATH)),
            "resume": (resume, _RESUME),
            "log": (log, optional(LOG)),
            "progress": (progress, FLAG),
        }
    )
    if tokenizer is None:
        problems.append("tokenizer is None; does the model's folder have a tokenizer.json?")
    problems += _text_problems(settings, model, tokenizer)
    problems += _companion_problems(settings, eval_data, output_dir, resume)
    problems += loss_problems(settings)
    problems += log_problems(log, output_dir)
    problems += private_problems(settings, data, model)
    problems += _context_problems(settings)
    # The remaining checks look into the model.
    if isinstance(model, ModelState):
        problems += _model_problems(settings, model)
        problems += memory_problems(settings, model)
        # Report an unwritable folder now, not after hours of training.
        if PATH.accepts(output_dir):
            problems += _folder_problems(Path(output_dir), model)
    return problems


def _text_problems(settings: Settings, model: Any, tokenizer: Any) -> list[str]:
    """Variables and prompts that the chat template does not take, and prompts that are too long."""
    if not isinstance(tokenizer, Tokenizer):
        return []
    given = {} if settings.template_kwargs is None else settings.template_kwargs
    if not TEMPLATE_KWARGS.accepts(given):
        return []  # its rule reports it
    if unread := template_kwargs_problem(given, tokenizer.chat_templates):
        return [unread]
    if settings.sample_prompts is None or not isinstance(model, ModelState):
        return []
    if given:
        tokenizer = tokenizer.with_template_kwargs(given)
    length = model.spec.max_seq_length
    return sample_problems(settings.sample_prompts, settings.sample_tokens, tokenizer, length)


def _companion_problems(
    settings: Settings, eval_data: Any, output_dir: Any, resume: Any
) -> list[str]:
    """Arguments that mean nothing without another one."""
    problems = []
    if settings.eval_every is not None and eval_data is None and settings.sample_prompts is None:
        problems.append(
            f"eval_every={settings.eval_every!r} without eval_data or sample_prompts; give the rows"
        )
    if settings.save_every is not None and output_dir is None:
        problems.append(f"save_every={settings.save_every!r} without output_dir; name a folder")
    if (resume is True or resume == "auto") and output_dir is None:
        problems.append(
            f"resume={resume!r} without output_dir; name the folder, or the checkpoint in"
            " resume=..."
        )
    problems += rates_problems(settings.learning_rates, _RATE)
    problems += schedule_problems(settings.lr_scheduler, settings.lr_scheduler_kwargs)
    return problems + _keeping_problems(settings, eval_data, output_dir)


def _context_problems(settings: Settings) -> list[str]:
    """Why the ranks that there are cannot train on rows that several of them have together."""
    ranks = settings.context_parallel
    if not _COUNT.accepts(ranks) or ranks == 1:
        return []
    problem = group_problem(f"context_parallel={ranks}", ranks)
    problems = [problem] if problem else []
    if not (isinstance(settings.loss, str) and settings.loss == "sft"):
        problems.append(
            f'context_parallel={ranks} with a loss other than "sft": other losses need whole rows'
        )
    if settings.clip_per_example is not None:
        problems.append(
            f"context_parallel={ranks} with clip_per_example: gradients of examples need whole rows"
        )
    return problems


def _keeping_problems(settings: Settings, eval_data: Any, output_dir: Any) -> list[str]:
    """Arguments that choose checkpoints or end a run early, without those that they need."""
    problems = []
    if settings.keep is not None and output_dir is None:
        problems.append(f"keep={settings.keep!r} without output_dir; name a folder")
    if settings.keep_best is True and eval_data is None:
        problems.append("keep_best=True without eval_data, by whose loss it chooses; give the rows")
    if settings.early_stopping is not None:
        given = f"early_stopping={settings.early_stopping!r}"
        if settings.eval_every is None:
            problems.append(f"{given} without eval_every: it counts evaluations")
        elif eval_data is None:
            problems.append(f"{given} without eval_data, whose loss it watches; give the rows")
    return problems


def _folder_problems(folder: Path, model: ModelState) -> list[str]:
    """Why the run cannot write to its folder."""
    try:
        error = adapter_folder_error(folder, model.spec)
    except OSError as problem:  # a name that is too long, for example
        error = problem.strerror
    error = error or base_problem(model.spec)
    return [f"output_dir: {error}"] if error else []


def _model_problems(settings: Settings, model: ModelState) -> list[str]:
    """Why this model's adapter cannot be trained with these settings."""
    if model.adapter is None:
        return ["model has no adapter to train; call fastlora.lora(model) first"]
    leaves = tree_leaves(model.adapter)
    problems = [
        f"{line}. A list of models is trained in one pass" for line in one_adapter_problems(model)
    ]
    problems += autocast_problems(model.base)
    if (length := model.spec.max_seq_length) < 2:
        problems.append(
            f"model's max_seq_length is {length}, but training needs at least 2 tokens: the first"
            " predicts the second; give fastlora.load a larger max_seq_length, such as 2048"
        )
    if any(x.dtype == torch.float16 for x in leaves):
        # B is zero at first, so A's first gradient is zero, and 0 / (sqrt(0) + eps) is NaN.
        problems.append(
            "model's adapter has float16 tensors, in which AdamW's eps = 1e-8 is 0; expected"
            " fastlora.lora(..., adapter_dtype='float32') and a bfloat16 base"
        )
    if isinstance(settings.learning_rates, Mapping):
        problems += unused_rates(settings.learning_rates, named_leaves(model.adapter))
    if _OPTIMIZER.accepts(settings.optimizer):
        problems += optimizer_problems(settings.optimizer, leaves)
    return problems


def memory_problems(settings: Settings, model: ModelState) -> list[str]:
    """Refuse packed batches that need an attention mask [b, t, t], one byte an element, of more
    than 8 GiB, or more pinned memory than the host has free.

    Without packing only rows of context parallel always have a mask, and their length is not known
    yet (`common_run.check_part_masks`).
    """
    if settings.packing is not True or not _COUNT.accepts(settings.batch_size):
        return []
    length, rows = model.spec.max_seq_length, settings.batch_size
    ranks = settings.context_parallel if _COUNT.accepts(settings.context_parallel) else 1
    packing = f"packing to max_seq_length={length} at batch_size={rows}"
    problems = []
    if (mask := large_mask(model, rows, length, ranks)) is not None:
        problems.append(
            f"{packing} {mask}; pass fastlora.load a max_seq_length that your rows fill, such as"
            " 2048, or packing=False"
        )
    offloads = model.spec.recompute == "offload" and model.base["norm"].is_cuda
    if offloads and (kept := large_offload(model, rows, length, ranks)) is not None:
        problems.append(
            f"{packing} with recompute='offload' {kept}; lower max_seq_length or batch_size, or"
            " take recompute='full'"
        )
    return problems


def check_vocabulary(examples: Sequence[Example | Pair | Labelled], vocab_size: int) -> None:
    """Raise a ValueError if the tokenizer gave an id that the model's vocabulary does not have."""
    largest = max(int(example.input_ids.max()) for example in examples)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives id {largest}, but the model's vocabulary is [0, {vocab_size}); "
            "do model and tokenizer come from the same folder?"
        )
