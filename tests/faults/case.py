"""Case: one bad call or one damaged file, what must come of it, and the verdict on what came."""

import copy
import os
import re
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastlora
from fastlora import functional
from faults import folders

REFUSALS = (ValueError, TypeError, FileNotFoundError, PermissionError, FloatingPointError)
MOST_TEXT = 20_000  # characters of an error message
IDS = torch.tensor([[1, 10, 11, 12, 13, 2], [1, 20, 21, 22, 23, 2]])


class Context:
    """The objects that all cases of a child share, and the working folder of the present case."""

    def __init__(self, good: Path):
        """`good` has the folders of `folders.write_all`."""
        self.good, self.cwd, self.logged = good, good, []

    def enter(self, cwd: Path) -> None:
        """Begin a case in a new, empty working folder."""
        cwd.mkdir(parents=True)
        os.chdir(cwd)
        self.cwd, self.logged = cwd, []

    def log(self, record: dict[str, Any]) -> None:
        """For `train`: counts the steps, so that an error after the work shows."""
        self.logged.append(record)

    @property
    def out(self) -> Path:
        """The folder that a case writes to. A refused call must not make it."""
        return self.cwd / "out"

    @cached_property
    def _loaded(self) -> Any:
        return fastlora.load(self.good / "base", device="cpu")

    @property
    def model(self) -> Any:
        """The base, without an adapter."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """The base's."""
        return self._loaded[1]

    @cached_property
    def tuned(self) -> Any:
        """The base with an adapter whose B is not zero."""
        return tuned(self.model)

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        """Two rows of six tokens."""
        return {"input_ids": IDS.clone(), "labels": IDS.clone()}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Eight chats."""
        return folders.rows(8)

    def copy(self, name: str) -> Path:
        """A folder of the good ones, copied into the case's own."""
        return Path(shutil.copytree(self.good / name, self.cwd / name))

    def adapter_folder(self) -> Path:
        """A good PEFT folder in the case's own."""
        self.tuned.save_pretrained(self.cwd / "adapter")
        return self.cwd / "adapter"

    def train(self, **changed: Any) -> Any:
        """Two steps of a tiny run; `changed` replaces or adds arguments."""
        given: dict[str, Any] = dict(model=self.tuned, tokenizer=self.tokenizer, data=self.rows)
        given |= dict(max_steps=2, batch_size=2, packing=False, progress=False, log=self.log)
        return fastlora.train(**given | changed)


def tuned(model: Any, seed: int = 0, **settings: Any) -> Any:
    """The model with LoRA of rank 2 and a random B."""
    model = fastlora.lora(model, **dict(r=2, lora_alpha=4) | settings)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda x: 0.2 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return model.with_adapter(torch.utils._pytree.tree_map(draw, model.adapter))


class Case(NamedTuple):
    """One fault."""

    name: str  # unique; its first word is the function or kind of file
    item: str  # of issue 16, such as "C11"
    call: Callable[[Context], Any]
    # Names of arguments or files that the refusal must hold. "a||b" stands for one of the two.
    named: tuple[str, ...] = ()
    # Looks at the result of a call that was not refused: None if it is right, else what is wrong.
    # Without it, every acceptance is wrong.
    accepts: Callable[[Context, Any], str | None] | None = None
    seconds: float = 5.0  # of CPU time
    every: int = 1  # the form for CI has one in so many cases of this sort


def right(_: Context, __: Any) -> None:
    """For `Case.accepts`: a call that may be accepted, as long as it neither crashes nor hangs."""


def verdict(case: Case, context: Context) -> dict[str, Any]:
    """Run a case; gives its name, item, outcome, detail and CPU seconds."""
    start = time.process_time()
    try:
        result = case.call(context)
    except BaseException as error:  # noqa: BLE001  tokenizers raises one of its own
        seconds = time.process_time() - start
        wrong = _wrong_refusal(case, context, error)
        outcome = "refused badly" if wrong else "refused"
        detail = f"{wrong or ''} {type(error).__name__}: {str(error)[:300]}".strip()
    else:
        seconds = time.process_time() - start
        wrong = "no error" if case.accepts is None else case.accepts(context, result)
        outcome, detail = ("accepted silently", wrong) if wrong else ("accepted rightly", "")
    if seconds > case.seconds and outcome in ("refused", "accepted rightly"):
        outcome, detail = "slow", f"{seconds:.1f} s of CPU, over {case.seconds:g}: {detail}"
    return dict(
        name=case.name, item=case.item, outcome=outcome, detail=detail, seconds=round(seconds, 3)
    )


def _wrong_refusal(case: Case, context: Context, error: BaseException) -> str | None:
    text = str(error)
    of_system = isinstance(error, OSError) and (error.filename is not None or "/" in text)
    if not isinstance(error, REFUSALS) and not of_system:
        return "[another kind of error]"
    has = lambda name: any(one in text for one in name.split("||"))
    if missing := [name for name in case.named if not has(name)]:
        return f"[does not name {', '.join(missing)}]"
    if isinstance(error, UnicodeEncodeError):
        return "[an encoder's error, not ours]"
    if len(text) > MOST_TEXT:
        return f"[{len(text):,} characters]"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f\x9b]", text):
        return "[control characters in the message]"
    if context.logged and not isinstance(error, FloatingPointError):
        return f"[after {len(context.logged)} steps]"
    if context.out.exists():
        return "[after files were written]"
    return None


def fl_arguments(context: Context) -> dict[str, Any]:
    """Good arguments of functional's functions."""
    model = context.tuned
    return dict(adapter=model.adapter, base=model.base, spec=model.spec)


def call_functional(context: Context, function: str, **changed: Any) -> Any:
    """One of functional's functions on good arguments, some of them changed."""
    own = (
        {"batch": context.batch}
        if function in ("loss", "row_losses")
        else {"input_ids": IDS.clone()}
    )
    if function == "token_logprobs":
        own["labels"] = IDS.clone()
    return getattr(functional, function)(**fl_arguments(context) | own | changed)


def without(mapping: Any, name: str) -> Any:
    """A copy of a dict without one key."""
    result = copy.copy(mapping)
    del result[name]
    return result
