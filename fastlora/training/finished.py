"""finish_folder(): the files of a finished run in its output_dir, beside the checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora.checkpoints.tensors import write_json, write_text
from fastlora.formats.peft.writing import save_adapter
from fastlora.models.self_contained import self_contained
from fastlora.models.state import ModelState
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.history import Record
from fastlora.training.learner import Learner
from fastlora.training.logging.backends import RUN_RECORD
from fastlora.training.model_card import may_replace_card, model_card
from fastlora.training.output_folder import check_space, run_bytes, write_run_file
from fastlora.training.run import Run


def finish_folder(
    folder: Path,
    model: ModelState,
    tokenizer: Tokenizer,
    identity: Mapping[str, Any],
    records: Sequence[Record],
    record: Mapping[str, Any],
) -> None:
    """Write training_run.json, run.json, the tokenizer, README.md and the adapter.

    A README.md that the user wrote is kept.

    Args:
        folder: output_dir.
        model: the trained one.
        tokenizer: its files, with the chat template, go beside the adapter: vLLM and chat front
            ends read them there.
        identity: of the run.
        records: of all steps.
        record: the content of run.json.
    """
    # The adapter comes last: PEFT loads no folder without it, so a folder that loads is complete.
    write_run_file(folder, identity, records)
    write_json(folder / RUN_RECORD, dict(record))
    tokenizer.save_pretrained(folder)
    card = folder / "README.md"
    saved = self_contained(model, unpark=False)  # of the rank that adapter_config.json names
    if not card.exists() or may_replace_card(card.read_text(errors="replace"), saved):
        write_text(card, model_card(saved, record))
    save_adapter(model, folder)


def tokenizer_bytes(tokenizer: Tokenizer) -> int:
    """Bytes of the tokenizer's files: 17 MB for Llama 3."""
    return sum(map(len, tokenizer.files.values()))


def check_run_space(
    folder: Path | None, run: Run, learner: Learner, done: int, tokenizer: Tokenizer
) -> None:
    """Raise an OSError if the disk of the folder is too full for the rest of a run."""
    if folder is not None:
        needed = run_bytes(learner, run.settings, done, run.steps) + tokenizer_bytes(tokenizer)
        check_space(folder, needed, "the run, with all its checkpoints,")
