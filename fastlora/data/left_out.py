"""LeftOut: counts of the rows and tokens that do not reach training, and the report of them."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from fastlora.checkpoints.atomic import atomic_write

REPORT_FILE = "rows_left_out.jsonl"

# Rows in the report, 200 bytes each. All rows are counted.
_MOST_LISTED = 100_000


@dataclass(slots=True, eq=False)
class LeftOut:
    """Counts of rows of one argument that were left out, such as `data`."""

    name: str  # of the argument
    read: int = 0  # rows
    rows: Counter[str] = field(default_factory=Counter)  # by what was done and why
    tokens: Counter[str] = field(default_factory=Counter)  # left out, by the same
    notes: list[str] = field(default_factory=list)  # lines about the mixture
    listed: list[dict[str, str]] = field(default_factory=list)

    def add(self, place: str, what: str, detail: str, tokens: int = 0) -> None:
        """Count a row.

        Args:
            place: of the row, such as "row 3".
            what: was done and why, in words that rows share, such as "skipped: not JSON".
            detail: about this row.
            tokens: that were left out.
        """
        self.rows[what] += 1
        self.tokens[what] += tokens
        if len(self.listed) < _MOST_LISTED:
            entry = {"data": self.name, "place": place, "what": what, "detail": f"{detail:.500}"}
            self.listed.append(entry)

    def lines(self) -> list[str]:
        """The counts as text; no lines if nothing was left out and no sources were mixed."""
        counts = [
            f"  {n:,} {what}" + (f" ({t:,} tokens)" if (t := self.tokens[what]) else "")
            for what, n in self.rows.most_common()
        ]
        if not counts and not self.notes:
            return []
        return [f"{self.name}: {self.read:,} rows read", *counts, *self.notes]


def report(left_out: Sequence[LeftOut], folder: Path | None) -> None:
    """Write the counts to stderr, whether or not a progress bar is shown, and the rows to a file.

    The file is folder/rows_left_out.jsonl, with one object per row that was left out or cut. Its
    keys: data (the argument), place, what, detail. Without such rows it is not written.

    Raises:
        OSError: the file cannot be written.
    """
    listed = [entry for part in left_out for entry in part.listed]
    lines = [line for part in left_out for line in part.lines()]
    if listed and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(entry) + "\n" for entry in listed)
        atomic_write(folder / REPORT_FILE, lambda file: file.write(text.encode()))
        lines.append(f"  the rows are listed in {folder / REPORT_FILE}")
    elif listed:
        lines += [f"  {entry['place']}: {entry['what']}: {entry['detail']}" for entry in listed[:3]]
    if lines:
        tqdm.write("\n".join(lines), file=sys.stderr)
