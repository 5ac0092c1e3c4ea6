"""Where BERT's files come from: a folder, or the hub and its cache."""

from __future__ import annotations

import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence

from lib.errors import InputError

MAX_BYTES = 64 << 20  # of a vocabulary or configuration; BERT's tokenizer.json has 0.5 million
FILES = "config.json, vocab.txt, tokenizer_config.json and model.safetensors (or pytorch_model.bin)"
REMEDY = f"put {FILES} into a folder and pass it as --bert_tokenizer FOLDER --ck_bert FOLDER"
OTHER_WEIGHTS = (".index.json", ".h5", ".msgpack")  # in several files, TensorFlow's, Flax's
TIMEOUT = 10.0  # seconds
NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*\w", re.ASCII)


def locate(source: str | os.PathLike[str], files: Sequence[str], what: str) -> tuple[str, bool]:
    """Find out where to load from, before a library retries for minutes without a network.

    Args:
        source: a folder, or a name on the hub (bert-base-uncased).
        files: any one of them will do.
        what: name of what the files hold, for messages.

    Returns:
        The folder or name for ``from_pretrained``, and whether to stay off the network.

    Raises:
        InputError: none of the files is in the folder; or the name is not in the hub's cache and
            the hub cannot be reached.
    """
    name = os.fspath(source)
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        if not any(os.path.isfile(os.path.join(folder, file)) for file in files):
            found = [f for f in sorted(os.listdir(folder)) if f.endswith(OTHER_WEIGHTS)]
            hint = f" but {found[0]}: save it again as one file for PyTorch;" if found else ":"
            raise InputError(f"folder {folder} has no {files[0]}{hint} {REMEDY}")
        _check_sizes(folder)
        return folder, True
    if not NAME.fullmatch(name) or os.path.exists(folder):
        raise InputError(f"{what} '{name}' is neither a folder nor a name on the hub: {REMEDY}")
    cached = _cached(name, files)
    if not cached and not hub_answers(name):
        raise InputError(
            f"{what} '{name}' is neither a folder nor in the cache, and the hub cannot be "
            f"reached: {REMEDY}"
        )
    return name, cached


def file_of(source: str, files: Sequence[str], offline: bool) -> str:
    """Path of the first of some files that a folder, or a model on the hub, has.

    Args:
        source, offline: of :func:`locate`.
        files: names, in the order of preference.

    Raises:
        InputError: it has none, or it cannot be fetched.
    """
    if os.path.isdir(source):
        return next(path for file in files if os.path.isfile(path := os.path.join(source, file)))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        try:
            return hf_hub_download(source, file, local_files_only=offline)
        except EntryNotFoundError:  # also of a file that is not in the cache
            continue
        except Exception as e:  # of the network, of many kinds
            raise failure(file + " of", source, e) from e
    raise InputError(f"'{source}' has no {' or '.join(files)}: {REMEDY}")


def _check_sizes(folder: str) -> None:
    """Raise an error for a folder with a text file that is none, by its size or kind."""
    for file in sorted(os.listdir(folder)):
        path = os.path.join(folder, file)
        if not file.endswith((".json", ".txt")) or os.path.isdir(path):
            continue
        if not os.path.isfile(path) or os.path.getsize(path) > MAX_BYTES:
            raise InputError(f"{path} has more than {MAX_BYTES >> 20} MB or is no file: {REMEDY}")


def failure(what: str, source: str, error: Exception) -> InputError:
    """The one-line error of a library that could not read what it found."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(f"cannot load {what} '{source}' ({lines[0][:160]}): {REMEDY}")


def hub_answers(name: str) -> bool:
    """Whether the hub can be asked for a model's files.

    Args:
        name: of the model.

    Returns:
        True where the hub answered at all, within `TIMEOUT` seconds.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(
        f"{constants.ENDPOINT}/{name}/resolve/main/config.json", method="HEAD"
    )
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT):
                answered.set()
        except urllib.error.HTTPError:  # transformers explains it
            answered.set()
        except (OSError, ValueError):
            pass

    # A thread, because looking up the host's name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return answered.is_set()


def _cached(name: str, files: Sequence[str]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
