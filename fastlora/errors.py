"""What every boundary function uses to refuse bad input."""


class CheckpointError(ValueError):
    """A file that is there and wrong. The message names the file, the key and the likely cure."""


def raise_problems(
    error: type[ValueError], heading: str, problems: list[str], cure: str = "", shown: int = 10
) -> None:
    """Raise `error` with every problem on a line of its own, the first `shown` of them in full.

    Does nothing when `problems` is empty.
    """
    if not problems:
        return
    lines = [f"  {p:.1000}" for p in problems[:shown]]  # a file may hold names of a megabyte
    if (more := len(problems) - shown) > 0:
        lines.append(f"  … and {more} more")
    raise error("\n".join([heading, *lines, *([cure] if cure else [])]))
