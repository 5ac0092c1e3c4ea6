"""A trained model as a folder to share: configuration, weights, tokenizer, model card."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lib.checkpoint.pretrained import write_folder
from lib.checkpoint.rebuild import Trained, open_trained
from lib.errors import InputError
from lib.weights import file_hash
from utils import log

# Shown of a results file, those that it has.
COLUMNS = ("P@0.5", "P@0.7", "P@0.9", "oIoU", "mIoU", "cIoU", "gIoU", "N_acc", "T_acc", "Acc")


def export_pretrained(trained: Trained, args: argparse.Namespace) -> None:
    """Write the folder, and check that what is read again has the same bits.

    Args:
        trained: the model.
        args: resume, output, results.

    Raises:
        InputError: the folder cannot be written, or the results are not of this checkpoint.
    """
    folder = Path(args.output)
    if Path(args.resume).resolve() == folder.resolve():
        raise InputError(f"--output {folder} is the folder that is read: give another one")
    metrics = metrics_table(Path(args.results), Path(args.resume)) if args.results else ""
    files = write_folder(folder, trained, model_card(trained, folder.resolve().name, metrics))
    again = open_trained(folder, accelerate=False).model.state_dict()
    for name, value in trained.model.state_dict().items():
        if not torch.equal(again[name], value):
            raise InputError(f"{folder}: {name} was not read as it was written: try again")
    for path in files:
        log.info("written: %s", path)
    log.info("checked: read again, all %d weights have the same bits", len(again))


def model_card(trained: Trained, name: str, metrics: str) -> str:
    """README.md of the folder, with the header that the Hugging Face hub reads.

    Args:
        trained: the model.
        name: of the folder.
        metrics: of :func:`metrics_table`; '' if it was not evaluated.
    """
    settings = trained.settings
    rows = "\n".join(f"| {k} | {settings[k]} |" for k in sorted(settings) if settings[k] != "")
    if not trained.recorded >= settings.keys():
        assumed = ", ".join(sorted(settings.keys() - trained.recorded))
        rows += f"\n\nThe checkpoint did not record {assumed}: these are the published defaults."
    return f"""---
tags:
- referring-image-segmentation
- {settings["model"]}
pipeline_tag: image-segmentation
---

# {name}

Referring image segmentation: an image and an expression in, the mask of the object meant out.

```python
from lib.predictor import Predictor

predictor = Predictor.from_pretrained("{name}")  # a folder, or owner/name on the hub
prediction = predictor.predict("photo.jpg", "the man in red")[0]
```

| setting | value |
|---|---|
{rows}

## Results

{metrics or "Not evaluated: no results file was given when the folder was written."}
"""


def metrics_table(path: Path, resume: Path) -> str:
    """Protocol and metrics of a results file of test.py, as Markdown.

    Args:
        path: of the file.
        resume: the checkpoint, whose results they must be.

    Raises:
        InputError: it is not of test.py, or of another checkpoint.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        about, label = content["args"], content["protocol"]["label"]
        of_file = content["checkpoint"]["sha256"]
        rows = {split: _values(rows["all"]) for split, rows in content["splits"].items()}
        columns = [c for c in COLUMNS if all(c in row for row in rows.values())]
        lines = [
            f"{about['dataset']} ({about['splitBy']}), protocol: {label}.",
            "",
            "| split | " + " | ".join(columns) + " | expressions |",
            "|---" * (len(columns) + 2) + "|",
        ]
        lines += [_line(split, row, columns) for split, row in rows.items()]
    except OSError as e:
        raise InputError(f"--results {path} cannot be read: {e.strerror}") from e
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"--results {path} is not what test.py writes: run it again") from e
    if of_file != file_hash(resume):
        raise InputError(f"--results {path} are of another checkpoint than {resume}: run test.py")
    return "\n".join(lines)


def _values(row: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a split by the heads of the table."""
    return {f"P@{k}": v for k, v in row["precision"].items()} | row


def _line(split: str, values: dict[str, Any], columns: Sequence[str]) -> str:
    cells = ["-" if values[c] is None else f"{values[c]:.2f}" for c in columns]
    return f"| {split} | {' | '.join(cells)} | {values['samples']} |"
