"""A trained model as a folder, as on the hub: config.json, model.safetensors, tokenizer.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import utils
from bert import config_values, hub, tokenizer_text
from lib.checkpoint.rebuild import Trained
from lib.errors import InputError
from lib.weights import read_checkpoint

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
FILES = (CONFIG, WEIGHTS, TOKENIZER)
KIND = "referring-segmentation"  # of config.json's entry "kind"


def read_folder(folder: Path) -> dict[str, Any]:
    """The content of a folder, in the form of a checkpoint's.

    Raises:
        InputError: a file is missing, damaged, or of something else.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"folder {folder} has no {missing[0]}: give a checkpoint, or a folder that "
            "tools.export --format pretrained wrote"
        )
    try:
        for name in (CONFIG, TOKENIZER):
            if (folder / name).stat().st_size > hub.MAX_BYTES:
                raise InputError(f"{folder / name} has more than {hub.MAX_BYTES >> 20} MB")
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tokenizer = (folder / TOKENIZER).read_text(encoding="utf-8")
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{folder}: its configuration cannot be read ({str(e)[:80]})") from e
    if not isinstance(config, dict) or config.get("kind") != KIND:
        raise InputError(f"{folder / CONFIG} is not of tools.export: give another folder")
    return {
        "model": read_checkpoint(folder / WEIGHTS),
        "args": config.get("settings"),
        "bert": {"config": config.get("text_encoder"), "tokenizer": tokenizer},
    }


def write_folder(folder: Path, trained: Trained, card: str) -> list[Path]:
    """Write a model as a folder that :func:`read_folder` reads, and any hub stores.

    Args:
        folder: made if it is missing; its files of the same names are replaced.
        trained: built with ``accelerate=False``.
        card: content of README.md, the model card.

    Returns:
        The files.

    Raises:
        InputError: a file cannot be written.
    """
    from safetensors.torch import save_file

    settings = {name: trained.settings[name] for name in sorted(trained.settings)}
    if fingerprint := trained.model.trained_with.get("vocabulary"):
        settings["vocabulary"] = fingerprint
    config = {
        "kind": KIND,
        "settings": settings,
        "text_encoder": config_values(trained.model.text_config),
    }
    state = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    utils.make_folder(folder)
    partial = folder / f"{WEIGHTS}.partial"
    try:
        save_file(state, partial, metadata={"format": "pt"})
        os.replace(partial, folder / WEIGHTS)
    except Exception as e:  # of the disk, in safetensors' own kind
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {folder / WEIGHTS} ({str(e)[:80]})") from e
    texts = {
        TOKENIZER: tokenizer_text(trained.tokenizer),
        "tokenizer_config.json": '{\n "tokenizer_class": "PreTrainedTokenizerFast"\n}\n',
        "README.md": card,
        CONFIG: json.dumps(config, indent=1) + "\n",
    }
    for name, text in texts.items():
        utils.write_text(text, folder / name)
    return [folder / name for name in (*texts, WEIGHTS)]


def locate(
    source: str | os.PathLike[str],
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model: itself, or that of a hub model in the hub's cache.

    Args:
        source: a folder or the name of a model on the hub, ``owner/name``.
        revision, token, cache_dir, local_files_only: as in huggingface_hub.

    Raises:
        InputError: neither a folder nor a hub's name; or it is not in the cache, and the hub cannot
            be reached or has no such model.
    """
    name = os.fspath(source)
    if os.path.isdir(name):
        return Path(name)
    if not hub.NAME.fullmatch(name) or os.path.exists(name):
        raise InputError(f"{name} is neither a folder nor the name of a model on the hub")
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    options["allow_patterns"] = list(FILES)
    offline = local_files_only or not hub.hub_answers(name)
    try:
        return Path(snapshot_download(name, local_files_only=offline, **options))
    except Exception as e:  # of the network and the cache, of many kinds
        lines = str(e).strip().splitlines() or [type(e).__name__]
        why = "it is not in the cache, and the hub cannot be reached" if offline else lines[0][:120]
        raise InputError(f"model '{name}': {why}: give a folder, or check name and network") from e
