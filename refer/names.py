"""Find images whose files are named a little otherwise than their records say."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from lib.errors import InputError

MOST_FOLDERS = 8  # of a name's end that are tried

ABSOLUTE = re.compile(r"[A-Za-z]:|[/\\]")  # how such a name begins
COCO_PREFIX = re.compile(r"COCO_(train|val|test)20\d\d_(?=\d{12}\.)")  # not in COCO's names of 2017


def parts_of(name: str) -> list[str]:
    """Folders and base name, from whatever system; [] for '..' and what no file can be named."""
    parts = re.sub(r"^[A-Za-z]:", "", name).replace("\\", "/").split("/")
    parts = [part for part in parts if part not in ("", ".")]
    try:
        os.fsencode(name)  # not possible for lone surrogates
    except UnicodeEncodeError:
        return []
    return [] if ".." in parts or "\0" in name else parts


def _spelling(part: str) -> str:
    """What the different spellings of a file's name have in common."""
    stem, ending = os.path.splitext(unicodedata.normalize("NFC", part))
    ending = {".jpeg": ".jpg"}.get(ending.lower(), ending.lower())
    return COCO_PREFIX.sub("", stem + ending)


def _key(parts: Sequence[str]) -> str:
    return "/".join(map(_spelling, parts))


def _ends(parts: Sequence[str]) -> list[Sequence[str]]:
    """A name, without its first folder, and so on."""
    return [parts[-n:] for n in range(min(len(parts), MOST_FOLDERS), 0, -1)]


class Finder:
    """Finds the files of images.

    A file is the image's if it has the name as written, from any system. Otherwise ending, accents,
    COCO's prefix and leading folders may differ, as long as neither another image nor another file
    could be meant.

    Args:
        folder: of the images.
        names: of all images.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        self._real = os.path.realpath(folder)
        self._names = names
        self._files: dict[Path, dict[str, list[str]]] = {}  # by spelling, of the folders looked at

    def path(self, name: str, where: str) -> Path:
        """The path of an image's file, which need not exist.

        Args:
            name: of the image.
            where: the name is written, for error messages.

        Raises:
            InputError: the name, or a symbolic link in the folder, leads out of the folder. The
                folder itself may be a link.
        """
        path = self.find(name)
        if path is None and (ABSOLUTE.match(name) or not parts_of(name)):
            raise InputError(
                f"{where}: the file name {name[:80]!r} leads out of the image folder "
                f"{self.folder}; {self.tried(name)}"
            )
        if path and os.path.commonpath([os.path.realpath(path), self._real]) != self._real:
            raise InputError(
                f"image {path} is a link out of the image folder: put the image itself there, "
                "or give its folder with --image_root"
            )
        return path or self.folder / name

    def find(self, name: str) -> Path | None:
        """The file of an image; None without one of which that is certain."""
        parts = parts_of(name)
        if not parts:
            return None
        for path in (self.folder / name, self.folder.joinpath(*parts)):
            if path.is_relative_to(self.folder) and os.path.isfile(path):
                return path
        for end in _ends(parts):
            if self._images[_key(end)] < 2 and (found := self._spelled_otherwise(end)):
                return found
        return None

    def tried(self, name: str) -> str:
        """What `find` looked for in vain, for a message."""
        ends = _ends(parts_of(name))
        names = " and ".join("/".join(end) for end in ends)[-200:]
        text = f"tried {names}, also with another case of the ending, other accents or COCO "
        text += "prefix, if only one file can be meant"
        several = [end for end in ends if self._images[_key(end)] > 1]
        if several:
            text += f"; several images are named {'/'.join(several[-1])[-100:]}"
        return text if ends else "no other name can be meant"

    @cached_property
    def _images(self) -> Counter[str]:
        """How many different names have an end, by its spelling."""
        different = {tuple(parts_of(name)) for name in self._names}
        return Counter(key for parts in different for key in set(map(_key, _ends(parts))))

    def _spelled_otherwise(self, parts: Sequence[str]) -> Path | None:
        path = self.folder
        for part in parts:
            if os.path.exists(path / part):
                path /= part
                continue
            alike = self._in(path).get(_spelling(part), [])
            if len(alike) != 1:
                return None
            path /= alike[0]
        return path if os.path.isfile(path) else None

    def _in(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._files:
            self._files[folder] = {}
            for name in os.listdir(folder) if os.path.isdir(folder) else ():
                self._files[folder].setdefault(_spelling(name), []).append(name)
        return self._files[folder]
