"""Tables of results as Markdown, and the pages that show them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lib.errors import InputError


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table."""
    lines: list[Sequence[str]] = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def put_between(page: Path, marks: tuple[str, str], new: str) -> None:
    """Replace what stands between two marks of a page.

    Raises:
        InputError: it lacks one of them.
    """
    text = page.read_text(encoding="utf-8")
    before, first, rest = text.partition(marks[0])
    _, last, after = rest.partition(marks[1])
    if not (first and last):
        raise InputError(f"{page} has lost the marks {marks[0]} … {marks[1]}")
    page.write_text(f"{before}{first}\n{new}\n{last}{after}", encoding="utf-8")
