"""The outputs of test.py: a JSON file of results and tables beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils
from data.dataset_refer_bert import ReferDataset
from lib import checkpoint
from lib.evaluation import published, tables
from lib.evaluation.protocol import Protocol
from lib.evaluation.summary import Summary
from refer.datasets import dataset_info


def tabulate(
    model: str,
    protocol: Protocol,
    datasets: dict[str, ReferDataset],
    summaries: dict[str, Summary],
    seen_images: Mapping[str, Tensor],
) -> tables.Results:
    """The numbers of each split beside the published ones.

    Args:
        model: its name.
        protocol: of the evaluation.
        datasets, summaries: by split.
        seen_images: of the model.
    """
    refer = next(iter(datasets.values())).refer
    entries = []
    for split, summary in summaries.items():
        dataset = datasets[split]
        data = (refer.dataset, refer.splitBy, split)
        row = published.look_up(
            model,
            data,
            protocol,
            len(dataset.samples_of_ref),
            dataset.expression_count,
        )
        others = published.other_models(data, len(dataset.samples_of_ref))
        seen = _count_seen(seen_images, dataset)
        if seen and row and not row.reason:
            row = replace(row, reason=f"trained on {seen} of its images")
        entries.append(tables.Entry(split, summary, row, others, seen))
    facts = {"dataset": refer.dataset, "splitBy": refer.splitBy, "model": model}
    title = f"{dataset_info(refer.dataset).display_name} ({refer.splitBy}), {model}"
    return tables.Results(title, facts, protocol.label, entries)


def _count_seen(seen: Mapping[str, Tensor], dataset: ReferDataset) -> int | None:
    """How many images of a split a model was trained on; None if its checkpoint does not tell."""
    ids = seen.get(dataset.refer.image_source, torch.empty(0))
    return int(np.isin(np.unique(dataset.image_ids), ids.numpy()).sum()) if seen else None


def write_results(
    path: Path,
    results: tables.Results,
    protocol: Protocol,
    summaries: dict[str, Summary],
    arguments: dict[str, Any],
    device: str,
) -> list[Path]:
    """Write the JSON file, and the tables beside it.

    Args:
        path: of the JSON file.
        results: of :func:`tabulate`.
        protocol: of the evaluation.
        summaries: by split.
        arguments: the command line's.
        device: the evaluation ran on.

    Returns:
        The files.

    Raises:
        InputError: a file cannot be written.
    """
    resume = arguments["resume"]
    content = {
        "splits": {split: summary.as_dict() for split, summary in summaries.items()},
        "trained_on_images": {entry.split: entry.trained_on for entry in results.entries},
        "protocol": protocol.as_dict(),
        "checkpoint": {"path": str(resume), "sha256": checkpoint.file_hash(resume)},
        "args": arguments,
        "seed": arguments["seed"],
        "environment": utils.environment() | {"device": device},
    }
    utils.write_json(content, path)
    return [path, *tables.write_tables(results, path)]
