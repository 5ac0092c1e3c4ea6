"""Why a file of weights cannot be read, in one line."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from lib.errors import InputError

GLOBAL = re.compile(r"GLOBAL ([\w.]+)|class .?([\w.]+\.\w+)")
SAVE_AGAIN = (
    "where you trust the file, save what is needed: c = torch.load(FILE, weights_only=False); "
    "torch.save({k: c[k] for k in ('model', 'bert_model', 'state_dict', 'optimizer', "
    "'lr_scheduler', 'epoch') if k in c}, 'weights.pth')"
)


def refusal(path: Path, error: Exception) -> InputError:
    """The error to raise for a file that ``torch.load`` or safetensors could not read.

    Args:
        path: of the file.
        error: of the library.
    """
    if found := GLOBAL.search(str(error)):
        name = found[1] or found[2]
        key = _key_of(path, name)
        at = f" in '{key}'" if key else ""
        return InputError(
            f"{path} holds more than tensors and plain values, a {name}{at}, which could run "
            f"code: it is not read; {SAVE_AGAIN}"
        )
    if "Unsupported operand" in str(error):
        return InputError(
            f"{path} holds more than tensors and plain values, or has another pickle protocol "
            f"than torch.save's default; {SAVE_AGAIN}"
        )
    kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
    return InputError(f"{path} is damaged or no {kind}: get it again")


def _key_of(path: Path, name: str) -> str:
    """The string that comes before a class in a pickle: the key of a dictionary it is in; or ''.

    The pickle's instructions are read, not carried out.
    """
    texts: list[str] = []
    memo: dict[Any, str] = {}
    memoized = 0
    is_text = False
    try:
        for opcode, value, _ in pickletools.genops(_pickle(path)):
            if "PUT" in opcode.name or opcode.name == "MEMOIZE":
                if is_text:
                    memo[memoized if value is None else value] = texts[-1]
                memoized += 1
            elif "GET" in opcode.name and value in memo:
                texts.append(memo[value])
            elif opcode.name == "GLOBAL" and str(value).split()[-1] == name.split(".")[-1]:
                return texts[-1]
            elif opcode.name == "STACK_GLOBAL" and texts[-1] == name.split(".")[-1]:
                return texts[-3]
            is_text = "UNICODE" in opcode.name
            if is_text:
                texts.append(str(value))
    except Exception:  # a damaged pickle raises nearly anything
        return ""
    return ""


def _pickle(path: Path) -> io.BytesIO:
    """The pickle of a zip file of ``torch.save``; older files raise BadZipFile."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        return io.BytesIO(archive.read(name))
