"""Errors that the library raises, and raise_problems, which reports several problems at once."""


class CheckpointError(ValueError):
    """A file exists but has wrong contents. The message names file, key and likely cure."""


def raise_problems(
    error: type[ValueError], heading: str, problems: list[str], cure: str = "", shown: int = 10
) -> None:
    """Raise `error` with one line for each problem; do nothing if there are no problems.

    Args:
        error: the class to raise.
        heading: first line.
        problems: one text each; the first 1000 characters are shown, since names in damaged files
            may be a megabyte long.
        cure: last line; "" leaves it out.
        shown: number of problems to show; the others are counted.
    """
    if not problems:
        return
    lines = [f"  {p:.1000}" for p in problems[:shown]]
    if (more := len(problems) - shown) > 0:
        lines.append(f"  … and {more} more")
    raise error("\n".join([heading, *lines, *([cure] if cure else [])]))
