"""Where a run is in data that are streamed, kept in the record of its last step."""

from pathlib import Path

from fastlora.data.left_out import report
from fastlora.training.history import Record
from fastlora.training.run import DATA_POSITION, Run


def with_position(record: Record, run: Run, records: list[Record]) -> Record:
    """The record with the place in the data from which a run that resumes reads on.

    It is removed from the last one of `records`.
    """
    if run.stream is not None:
        record[DATA_POSITION] = run.stream.position
        if records:
            records[-1].pop(DATA_POSITION, None)
    return record


def figures(record: Record) -> Record:
    """What `log` is called with: the record without its place in the data."""
    return {name: figure for name, figure in record.items() if name != DATA_POSITION}


def encoded_rows(run: Run) -> str:
    """How many rows of a stream are encoded, for the bar; "" if all are, as of other data."""
    return "" if run.stream is None else f"{run.stream.left_out.read:,} rows"


def report_rows(run: Run, folder: Path | None, reports: bool = True) -> None:
    """Report what was left out of data that are not streamed, unless another rank does."""
    if run.stream is None and reports:
        report(run.left_out, folder)


def finish_stream(run: Run, folder: Path | None, reports: bool = True) -> None:
    """End the threads of data that were streamed, and report what was left out of them."""
    if run.stream is not None:
        run.stream.close()
    if run.stream is not None and reports:
        report([*run.left_out, run.stream.left_out], folder)
