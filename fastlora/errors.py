"""Errors that the library raises, and raise_problems, which reports several problems at once."""


class CheckpointError(ValueError):
    """A file exists but has wrong contents. The message names file, key and likely cure.

    Characters of the message that do not print are escaped.
    """

    def __init__(self, message: str) -> None:
        """Make the error. `message` may quote any file."""
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text without characters that do not print, which are escaped; line breaks stay.

    Names and values in files may hold codes that clear a terminal's screen or write over earlier
    lines, and half of a surrogate pair, which cannot be printed at all.
    """
    if text.replace("\n", "").isprintable():
        return text
    escaped = (
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(escaped)


def lacks_extra(purpose: str, package: str, extra: str, cause: object = "") -> ModuleNotFoundError:
    """The error for a package of an optional extra that is not installed.

    The command is for a clone, because PyPI's fastlora is another project.

    Args:
        purpose: what needs the package, the subject of the sentence.
        package: its name.
        extra: of pyproject.toml.
        cause: the error of the import, whose text is added; a damaged package fails with others.
    """
    why = f" ({cause!s:.200})" if str(cause) else ""
    return ModuleNotFoundError(
        f"{purpose} needs {package}; in the clone of fastlora: pip install -e '.[{extra}]'{why}",
        name=package,
    )


def raise_problems(
    error: type[ValueError], heading: str, problems: list[str], cure: str = "", shown: int = 10
) -> None:
    """Raise `error` with one line for each problem; do nothing if there are no problems.

    Args:
        error: the class to raise.
        heading: first line.
        problems: one text each; the first 1000 characters are shown, since names in damaged files
            may be a megabyte long. Characters that do not print are escaped.
        cure: last line; "" leaves it out.
        shown: number of problems to show; the others are counted.
    """
    if not problems:
        return
    lines = [f"  {p:.1000}" for p in problems[:shown]]
    if (more := len(problems) - shown) > 0:
        lines.append(f"  … and {more} more")
    raise error(printable("\n".join([heading, *lines, *([cure] if cure else [])])))
