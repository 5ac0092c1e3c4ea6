"""Recipes: files of command-line options, one and its value a line.

``#`` begins a comment. Lines below ``[train.py]`` are for that script alone, until the next such
line; those before the first one are for every script.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lib.errors import InputError

FOLDER = Path(__file__).parent.parent / "recipes"
ENDING = ".args"
SCRIPTS = ("train.py", "test.py", "demo_inference.py")


def expand(words: Sequence[str], script: str) -> list[str]:
    """Put the options of recipes before those of the command line, which so override them.

    Args:
        words: of the command line. ``@FILE`` is a recipe where FILE ends in ``.args``, and as the
            first word whatever its ending; elsewhere it is a value, such as a sentence.
        script: whose command line it is, like ``train.py``.

    Raises:
        InputError: no such recipe, or a line in it that is no option.
    """
    named = [
        i
        for i, word in enumerate(words)
        if word.startswith("@") and (i == 0 or word.endswith(ENDING))
    ]
    options = [o for i in named for o in read_recipe(words[i][1:], script)]
    return options + [word for i, word in enumerate(words) if i not in named]


def read_recipe(name: str, script: str) -> list[str]:
    """The words of a recipe that are for a script.

    Args:
        name: a file, from here or from the project's folder.
        script: see :func:`expand`.

    Raises:
        InputError: it cannot be read, or a line is no option.
    """
    path = next((p for p in (Path(name), FOLDER.parent / name) if p.is_file()), None)
    if path is None:
        raise InputError(f"no recipe {name}: there are {', '.join(recipes())}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"the recipe {path} cannot be read: {e}") from e
    words: list[str] = []
    section = script
    for number, line in enumerate(lines, 1):
        heading = re.fullmatch(r"\s*\[(.+)\]\s*", line)
        section = heading[1] if heading else section
        if section not in (script, *SCRIPTS):
            raise InputError(f"{path}, line {number}: [{section}] is none of {', '.join(SCRIPTS)}")
        option = [] if heading else _option(line, f"{path}, line {number}")
        words += option if section == script else []
    return words


def _option(line: str, where: str) -> list[str]:
    """An option and its values; nothing of an empty line."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as e:
        raise InputError(f"{where}: {e}, in: {line.strip()}") from e
    if words and not words[0].startswith("-"):
        raise InputError(f"{where}: an option begins with --, not: {line.strip()}")
    return words


def recipes() -> list[str]:
    """The project's recipes, as one names them on a command line."""
    return sorted(f"@{FOLDER.name}/{p.name}" for p in FOLDER.glob(f"*{ENDING}"))
