"""What grows with the dataset and with the number of GPUs: loader, memory, evaluation, gradients.

    python -m benchmarks.scale                              # some minutes on a CPU
    python -m benchmarks.scale --report benchmarks/results/scale_*.json

Measures the rate of the loader's workers on RefShapes (hard: images of 320 to 640 px), the memory
that reading annotations takes, and the memory that a process and its workers hold. Annotations of
RefCOCO's size are made up (benchmarks/refcoco_size.py); what is held of 10 and 100 times as many is
measured with their arrays repeated. How evaluation divides among processes is counted, not timed;
gradients are counted in bytes. The tables go to docs/scale.md, which explains them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig

import utils
from args import Parser
from benchmarks import refcoco_size
from benchmarks.data import WithoutImages, processor_seconds, proportional_memory
from benchmarks.pages import markdown, put_between
from benchmarks.speed import RESULTS, machine, slug
from bert import load_tokenizer
from data import dataset_refer_bert
from data.dataset_refer_bert import ReferDataset
from data.loaders import RandomExpressionSampler, ShardedBatches, build_loader
from data.refshapes.generate import generate
from lib.evaluation.metrics import Counts
from lib.segmentation import build_model
from lib.training import optim
from refer.arrays import Arrays, Texts
from refer.refer import REFER

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
MARKS = ("<!-- tables of benchmarks.scale -->", "<!-- end -->")
PROCESSES = (1, 8, 64)
MB = 1e6


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's flags."""
    p = Parser(prog="benchmarks.scale", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--scenes", type=int, default=60, help="of RefShapes, for the loader")
    p.add_argument("--img_size", type=int, default=480)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--workers", default="1,2", help="comma-separated numbers of loader processes")
    p.add_argument("--batches", type=int, default=16, help="of a round of the loader")
    p.add_argument("--times", default="1,10,100", help="RefCOCO's size, for the memory held")
    p.add_argument("--read", default="1,3", help="RefCOCO's size, for the memory of reading")
    p.add_argument("--reads", type=int, default=20000, help="samples that the workers read")
    p.add_argument("--output", help="JSON file, by default results/scale_<machine>.json")
    p.add_argument("--report", nargs="+", metavar="JSON", help="only put their tables in the page")
    p.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # root, BERT's folder, times
    return p.parse_args(argv)


def numbers(text: str) -> list[int]:
    """Of a comma-separated list."""
    return [int(word) for word in text.split(",")]


# ---- loader ----


def loader_rates(
    root: Path, side: int, batch: int, workers: Sequence[int], batches: int
) -> dict[str, Any]:
    """Images a second of a training loader, by the clock and by its workers' processor time.

    Args:
        root: a REFER root with a ``bert`` folder.
        side, batch: of the samples and batches.
        workers: numbers of loader processes, each measured.
        batches: of a round; the first round warms up.
    """
    data = ReferDataset(REFER(root), "train", load_tokenizer(str(root / "bert")), side)
    rows = []
    for number in workers:
        sampler = RandomExpressionSampler(data.samples_of_ref, batch, seed=0)
        loader = build_loader(data, sampler, number)
        rounds = -(-batches // len(sampler))
        for _ in range(2):
            used = sum(map(processor_seconds, _pids(loader)))
            began, images = time.perf_counter(), 0
            for _ in range(rounds):
                images += sum(len(found["index"]) for found in loader)
            wall = time.perf_counter() - began
            busy = sum(map(processor_seconds, _pids(loader))) - used
        rows.append({"workers": number, "images_per_second": images / wall})
        rows[-1]["images_per_cpu_second"] = images / busy
    size = np.mean([data.original_image(i).size for i in range(min(20, len(data)))], axis=0)
    return {"rows": rows, "img_size": side, "image": size.tolist(), "cpus": os.cpu_count()}


def _pids(loader: DataLoader[Any]) -> list[int]:
    passing = loader._iterator
    return [w.pid for w in passing._workers] if passing else []  # type: ignore[attr-defined]


def loader_table(result: dict[str, Any]) -> str:
    """The loader's rates as Markdown."""
    width, height = result["image"]
    text = f"Loader, images of about {width:.0f} x {height:.0f} to {result['img_size']} px, "
    text += f"{result['cpus']} CPUs:"
    head = ["workers", "images/s", "images/s a worker", "images a second of its processor"]
    rows = [
        [
            *(f"{row['workers']}", f"{row['images_per_second']:.0f}"),
            f"{row['images_per_second'] / row['workers']:.0f}",
            f"{row['images_per_cpu_second']:.0f}",
        ]
        for row in result["rows"]
    ]
    return f"{text}\n\n{markdown(head, rows)}"


# ---- memory ----


def repeated(arrays: Arrays, times: int) -> Arrays:
    """The arrays of a dataset whose references come so many times, in the same images."""
    per_reference = ("ref_id", "image_id", "category_id", "image", "same_category", "split")
    per_expression, per_annotation = ("sent_id", "raw", "sent"), ("ann_id", "other_segmentation")
    per_image = ("height", "width", "file_name", "image_ids", "image_rows")
    plain = (*per_reference, *per_expression, *per_annotation, *per_image, "coordinates")
    changed: dict[str, Any] = {}
    for field in fields(arrays):
        value = getattr(arrays, field.name)
        if isinstance(value, Texts) and field.name in plain:
            letters = np.tile(value.letters, times)
            changed[field.name] = Texts(letters, _offsets(value.ends, times))
        elif field.name.endswith("_offsets"):
            changed[field.name] = _offsets(value, times)
        elif field.name in plain:
            changed[field.name] = np.tile(value, times)
    return replace(arrays, **changed)


def _offsets(ends: Any, times: int) -> Any:
    """(N + 1,) offsets of what comes so many times."""
    lengths = np.tile(np.diff(ends), times)
    result = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=result[1:])
    return result


def size_of(arrays: Arrays) -> int:
    """Bytes."""
    values = [getattr(arrays, field.name) for field in fields(arrays)]
    parts = [p for v in values for p in ((v.letters, v.ends) if isinstance(v, Texts) else (v,))]
    return sum(part.nbytes for part in parts)


def held(root: Path, bert: str, times: int, reads: int) -> dict[str, Any]:
    """Memory of a process with so many times the annotations of ``root``, and of its workers."""
    tokenizer = load_tokenizer(bert)
    imports = proportional_memory(os.getpid())
    refer = REFER(root)
    peak = utils.peak_memory_gb(torch.device("cpu")) * 1e3
    arrays = refer.arrays
    once = WithoutImages(refer, "train", tokenizer, 32)
    tokens = once.input_ids, once._tokens
    refer._arrays = repeated(arrays, times)
    del arrays, once
    compact = [np.concatenate([part] * times) for part in tokens]  # tokenised once, for time
    with mock.patch.object(dataset_refer_bert, "encode_compact", return_value=compact):
        data = WithoutImages(refer, "train", tokenizer, 32)
    order = np.random.default_rng(0).permutation(len(data))[:reads].tolist()
    loader = DataLoader(data, 32, sampler=order, num_workers=2)
    main = proportional_memory(os.getpid())
    batches = iter(loader)
    workers: list[float] = []
    for done, _ in enumerate(batches, 1):
        if done == len(loader) - 4:  # they end with the last batch
            pids = [w.pid for w in batches._workers]  # type: ignore[attr-defined]
            workers = [proportional_memory(pid) for pid in pids]
            private = [_private(pid) for pid in pids]
    return {
        "times": times,
        "expressions": len(data),
        "arrays_mb": size_of(refer.arrays) / MB,
        "tokens_mb": sum(part.nbytes for part in compact) / MB,
        "imports_mb": imports,
        "main_mb": main,
        "worker_mb": float(np.mean(workers)),
        "worker_private_mb": float(np.mean(private)),
        "reading_peak_mb": peak,
    }


def _private(pid: int) -> float:
    """MB that no other process shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / MB


def in_own_process(root: Path, bert: Path, times: int, reads: int) -> dict[str, Any]:
    """:func:`held`, in a process that has done nothing else."""
    command = [sys.executable, "-m", "benchmarks.scale", "--reads", str(reads)]
    command += ["--part", str(root), str(bert), str(times)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def memory_tables(result: dict[str, Any]) -> str:
    """Memory as Markdown."""
    head = ["RefCOCO's annotations", "expressions (train)", "arrays and tokens", "main process"]
    head += ["a worker, its share", "of it private"]
    rows = [
        [
            *(f"{row['times']}x", f"{row['expressions']:,}"),
            f"{row['arrays_mb'] + row['tokens_mb']:,.0f} MB",
            *(f"{row[k]:,.0f} MB" for k in ("main_mb", "worker_mb", "worker_private_mb")),
        ]
        for row in result["held"]
    ]
    reading = [
        [f"{row['times']}x", *(f"{row[k]:,.0f} MB" for k in ("files_mb", "reading_peak_mb"))]
        for row in result["read"]
    ]
    peak = markdown(["RefCOCO's annotations", "files", "peak while reading"], reading)
    return f"{markdown(head, rows)}\n\n{peak}"


# ---- evaluation and gradients, counted ----


def shares(data: ReferDataset, batch: int, processes: int) -> dict[str, Any]:
    """How the evaluation of a split divides: samples of each process, images read twice."""
    order = data.group_by_image(range(len(data)))
    parts = [
        [i for found in ShardedBatches(order, batch, rank, processes) for i in found]
        for rank in range(processes)
    ]
    images = [len({int(data.image_ids[i]) for i in part}) for part in parts]
    most = max(map(len, parts))
    return {
        "processes": processes,
        "most": most,
        "least": min(map(len, parts)),
        "efficiency": len(data) / (processes * most),
        "decoded": sum(images),
        "images": len({int(i) for i in data.image_ids}),
        "reduced_mb": Counts(len(data), torch.device("cpu")).table.nbytes / MB,
    }


def share_table(rows: list[dict[str, Any]]) -> str:
    """:func:`shares` as Markdown."""
    head = ["processes", "samples of a process", "of the ideal speed", "images decoded", "reduced"]
    lines = [
        [
            *(
                str(row["processes"]),
                f"{row['least']} to {row['most']}",
                f"{row['efficiency']:.0%}",
            ),
            *(f"{row['decoded'] / row['images']:.2f}x", f"{row['reduced_mb']:.2f} MB"),
        ]
        for row in rows
    ]
    return markdown(head, lines)


def gradients() -> dict[str, int]:
    """Bytes of float32 gradients that DDP averages in a step, by model; Swin base, BERT-base."""
    result = {}
    for name in ("lavt", "lavt_one", "crossvlt"):
        with torch.device("meta"):
            model = build_model(name, swin_type="base", window_size=12, text_config=BertConfig())
        optim.freeze_unused(model, optim.parameter_groups(model, 1e-2))
        result[name] = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return result


# ---- the script ----


def tables(record: dict[str, Any]) -> str:
    """A result file as Markdown."""
    bytes_of = [[name, f"{size / MB:.0f} MB"] for name, size in record["gradients"].items()]
    return "\n\n".join(
        [
            f"{record['machine']['cpu']}; PyTorch {record['environment']['torch']}.",
            loader_table(record["loader"]),
            memory_tables(record),
            f"Evaluation of {record['split']} expressions, batches of {record['batch_size']}:",
            share_table(record["evaluation"]),
            markdown(["model, Swin base", "gradients of a step"], bytes_of),
        ]
    )


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All parts."""
    shapes = folder / "shapes"
    generate(shapes, level="hard", scenes=args.scenes, val_scenes=1, test_scenes=1)
    workers = numbers(args.workers)
    record: dict[str, Any] = {
        "loader": loader_rates(shapes, args.img_size, args.batch_size, workers, args.batches),
        "batch_size": args.batch_size,
        "gradients": gradients(),
    }
    record["read"] = []
    for times in numbers(args.read):
        root = folder / f"read{times}"
        files = refcoco_size.write(root, times=times)
        row = in_own_process(root, shapes / "bert", 1, 64 * 5)
        size = sum(path.stat().st_size for path in files.iterdir()) / MB
        record["read"].append(row | {"times": times, "files_mb": size})
    root = folder / f"read{numbers(args.read)[0]}"
    record["held"] = [
        in_own_process(root, shapes / "bert", times, args.reads)
        for times in utils.progress(numbers(args.times), "memory", 0)
    ]
    data = WithoutImages(REFER(root), "val", load_tokenizer(str(shapes / "bert")), 32)
    record["split"] = len(data)
    record["evaluation"] = [shares(data, args.batch_size, number) for number in PROCESSES]
    return record | {"machine": machine(), "environment": utils.environment()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the file, print the tables."""
    args = parse(argv)
    if args.part:
        root, bert, times = args.part
        print(json.dumps(held(Path(root), bert, int(times), args.reads)))
        return
    if args.report:
        texts = [Path(path).read_text(encoding="utf-8") for path in args.report]
        put_between(PAGE, MARKS, "\n" + "\n\n".join(tables(json.loads(t)) for t in texts) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        record = measure(args, Path(folder))
    name = slug(f"{record['machine']['cpu']} {record['machine']['cpus']}cpu")
    path = Path(args.output or RESULTS / f"scale_{name}.json")
    utils.write_json(record, path)
    print(tables(record))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    utils.run_script(main)
