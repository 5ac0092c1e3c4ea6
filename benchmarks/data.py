"""Measure the start of a dataset, its memory, and the making of samples against the release's.

    python -m benchmarks.data --refer_data_root ROOT        # ROOT: of real images
    python -m benchmarks.data --report benchmarks/results/data_*.json   # the tables again

Start: made-up annotations of RefCOCO's size are loaded, indexed and tokenised (train and val).
Memory: of a main process and its workers, by proportional set size. Samples: each step and the
whole, ours and the release's in turn on one thread, in seconds of processor time, which other
programs change less than the clock's; images and masks are equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

import utils
from args import Parser
from benchmarks import refcoco_size
from benchmarks.pages import markdown
from benchmarks.speed import machine, slug
from bert.tokenizer import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.loaders import collate, draw_expressions
from data.transforms import MEAN, STD, as_tensor, normalize, resize_image, resize_mask
from lib.errors import InputError
from refer.refer import REFER

RESULTS = Path(__file__).parent / "results"
WORKERS = 8
Way = tuple[Dataset[Any], Callable[[list[Any]], Any]]  # samples, and how a batch is made of some
KB = 1024


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's options."""
    p = Parser(prog="benchmarks.data", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--refer_data_root", default="./refer/data/", help="for the samples")
    p.add_argument("--dataset", default="refcoco")
    p.add_argument("--splitBy", default="unc")
    p.add_argument("--split", default="train")
    p.add_argument("--bert_tokenizer", help="hub name or folder")
    p.add_argument("--img_size", type=int, default=480)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--batches", type=int, default=20, help="of a round")
    p.add_argument("--rounds", type=int, default=3, help="of starting and of loading")
    p.add_argument("--workers", type=int, default=WORKERS)
    p.add_argument("--reads", type=int, default=20000, help="samples that the workers read")
    p.add_argument("--output", help="JSON file, by default results/data_<machine>.json")
    p.add_argument("--report", nargs="+", help="only print the tables of these files")
    p.add_argument("--part", choices=["start", "arrays", "dicts"], help=argparse.SUPPRESS)
    return p.parse_args(argv)


# ---- start and memory, each in a process of its own ----


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Load, index and tokenise; imports and the tokenizer's own loading are not counted."""
    tokenizer = load_tokenizer(args.bert_tokenizer)
    wall, cpu = time.perf_counter(), time.process_time()
    refer = REFER(args.refer_data_root, args.dataset, args.splitBy)
    loaded = time.perf_counter(), time.process_time()
    for split in ("train", "val"):
        ReferDataset(refer, split, tokenizer, args.img_size)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "wall_load": loaded[0] - wall,
        "cpu_load": loaded[1] - cpu,
    }


class WithoutImages(ReferDataset):
    """Samples with a grey image."""

    def original_image(self, index: int) -> Image.Image:
        """A grey one."""
        return Image.new("RGB", (8, 8))


class AsRecords(Dataset[Any]):
    """The same samples from dicts and lists, one object a record, as the release keeps them."""

    def __init__(self, refer: REFER, split: str, tokenizer: Any) -> None:
        self.refer = refer
        self.samples = []
        for ref in refer.loadRefs(refer.getRefIds(split=split)):
            for sentence in ref["sentences"]:
                ids = tokenizer.encode(sentence["raw"], add_special_tokens=True)[:20]
                self.samples.append((ref["ref_id"], ids, [1] * len(ids)))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        ref_id, ids, mask = self.samples[index]
        covered = self.refer.getMask(self.refer.Refs[ref_id])["mask"]
        return int(covered.sum()), len(ids), sum(mask)


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Proportional memory of this process and its workers, before and after a pass."""
    tokenizer = load_tokenizer(args.bert_tokenizer)
    alone = proportional_memory(os.getpid())
    refer = REFER(args.refer_data_root, args.dataset, args.splitBy)
    data: Dataset[Any]
    if args.part == "arrays":
        data = WithoutImages(refer, "train", tokenizer, 32)
    else:
        data = AsRecords(refer, "train", tokenizer)
    order = np.random.default_rng(0).permutation(len(data))[: args.reads].tolist()  # type: ignore[arg-type]
    loader = DataLoader(data, 32, sampler=order, num_workers=args.workers, persistent_workers=True)
    main = proportional_memory(os.getpid())
    batches = iter(loader)
    next(batches)
    pids = [os.getpid(), *(w.pid for w in batches._workers)]  # type: ignore[attr-defined]
    before = [proportional_memory(pid) for pid in pids]
    for _ in batches:
        pass
    after = [proportional_memory(pid) for pid in pids]
    return {
        "imports_mb": alone,
        "main_mb": main,
        "before_mb": sum(before),
        "after_mb": sum(after),
        "worker_after_mb": statistics.mean(after[1:]),
        "workers": args.workers,
        "reads": len(order),
    }


def proportional_memory(pid: int) -> float:
    """PSS, MB: a page that n processes share counts for 1/n in each."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert match
    return int(match[1]) * KB / 1e6


def in_own_process(args: argparse.Namespace, part: str, root: Path) -> Any:
    """A part's result, from a process that has done nothing else."""
    command = [sys.executable, "-m", "benchmarks.data", "--part", part]
    command += ["--refer_data_root", str(root), "--bert_tokenizer", args.bert_tokenizer]
    command += ["--workers", str(args.workers), "--reads", str(args.reads)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"{' '.join(command)} failed; see above")
    return json.loads(done.stdout.splitlines()[-1])


def measure_start(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Seconds of starting; the fastest of some rounds."""
    folder = refcoco_size.write(root)
    rounds = utils.progress(range(args.rounds), "start", 0)
    runs = [in_own_process(args, "start", root) for _ in rounds]
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {"files": sizes, "best": min(runs, key=lambda run: run["wall"]), "runs": runs}


# ---- samples ----


class Release(Dataset[Any]):
    """The release's steps to a sample, from its description: all of it in the worker, in floats."""

    def __init__(self, data: ReferDataset, refer: REFER) -> None:
        self.data = data
        self.refer = refer
        self.size = [data.img_size] * 2
        self.records = list(data.records)

    def decode(self, i: int) -> Image.Image:
        """The image."""
        with Image.open(self.refer.image_path(self.records[i].image_id)) as image:
            return image.convert("RGB")

    def draw(self, i: int) -> Image.Image:
        """The mask at the original size, of all polygons at once."""
        ref = self.refer.Refs[self.records[i].ref_id]
        image = self.refer.Imgs[ref["image_id"]]
        polygons = self.refer.refToAnn[ref["ref_id"]]["segmentation"]
        runs = coco_mask.frPyObjects(polygons, image["height"], image["width"])
        covered = np.sum(coco_mask.decode(runs), axis=2).astype(np.uint8)
        mask = np.zeros(covered.shape)
        mask[covered == 1] = 1
        return Image.fromarray(mask.astype(np.uint8))

    def resize(self, image: Image.Image) -> Image.Image:
        """The image at the model's size."""
        return tv.resize(image, self.size)

    def resize_mask(self, mask: Image.Image) -> Tensor:
        """The mask at the model's size."""
        small = tv.resize(mask, self.size, InterpolationMode.NEAREST)
        return torch.as_tensor(np.array(small).copy(), dtype=torch.int64)

    def normalise(self, image: Image.Image) -> Tensor:
        """The image as normalised floats."""
        return tv.normalize(tv.to_tensor(image), list(MEAN), list(STD))

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = self.normalise(self.resize(self.decode(i)))
        target = self.resize_mask(self.draw(i))
        return {"image": image, "target": target, **self.data.text(i), "index": i}


def check_equal(ours: dict[str, Any], release: dict[str, Any]) -> None:
    """Compare batches, after what the device does of ours.

    Raises:
        InputError: they differ.
    """
    made = ours | {"image": normalize(ours["image"]), "target": ours["target"].long()}
    for name, value in release.items():
        if not torch.equal(made[name], value):
            raise InputError(f"{name} of samples {ours['index'].tolist()} is not the release's")


def measure_samples(args: argparse.Namespace) -> dict[str, Any]:
    """Processor time a sample: of each step, and in training's and in evaluation's order."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.bert_tokenizer)
    where = (args.refer_data_root, args.dataset, args.splitBy)
    data = ReferDataset(REFER(*where), args.split, tokenizer, args.img_size)
    release = Release(data, REFER(*where))
    drawn = draw_expressions(data.samples_of_ref, [0, 0], shuffle=True)
    size = min(args.batch_size, len(data))
    ways: dict[str, Way] = {"ours": (data, collate), "release": (release, default_collate)}
    result: dict[str, Any] = {"steps": steps(data, release, drawn[:64])}
    for name, order in (("training", drawn), ("evaluation", list(range(len(data))))):
        batches = [
            [order[j % len(order)] for j in range(k * size, (k + 1) * size)]
            for k in range(args.batches)
        ]
        for batch in batches:
            check_equal(*(stack([made[i] for i in batch]) for made, stack in ways.values()))
        result[name] = turns(ways, batches, args.rounds)
    return result | {"batch_size": size, "img_size": args.img_size}


def turns(ways: dict[str, Way], batches: list[list[int]], rounds: int) -> dict[str, Any]:
    """Processor seconds that a loader's worker takes for a sample, all included; medians.

    A round is a pass over the batches, first with one way's worker, then with the other's.
    """
    spent: dict[str, list[float]] = {key: [] for key in ways}
    loaders = {
        key: DataLoader(
            data, batch_sampler=batches, num_workers=1, collate_fn=stack, persistent_workers=True
        )
        for key, (data, stack) in ways.items()
    }
    pids: dict[str, int] = {}
    for _ in utils.progress(range(rounds + 1), "rounds", 0):
        for key, loader in loaders.items():
            began = processor_seconds(pids[key]) if key in pids else 0.0
            passing = iter(loader)
            pids[key] = passing._workers[0].pid  # type: ignore[attr-defined]
            for _ in passing:
                pass
            used = processor_seconds(pids[key]) - began
            spent[key].append(used / sum(map(len, batches)))
    ours, release = (spent[key][1:] for key in ("ours", "release"))  # the first one warms up
    ratio = statistics.median(b / a for a, b in zip(ours, release, strict=True))
    medians = {"ours": statistics.median(ours), "release": statistics.median(release)}
    return {**medians, "ratio": ratio, "rounds": spent}


def processor_seconds(pid: int) -> float:
    """That a process's threads have used."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def steps(data: ReferDataset, release: Release, samples: list[int]) -> dict[str, Any]:
    """Processor seconds of each step, [ours, the release's]; the fastest of some passes."""
    images = [data.original_image(i) for i in samples]
    small = [release.resize(image) for image in images]
    masks = [release.draw(i) for i in samples]
    batch = default_collate([data.image(i) for i in samples[:8]])
    places = range(len(samples))
    ways: dict[str, list[Callable[[], Any] | None]] = {
        "decode": [
            lambda: [data.original_image(i) for i in samples],
            lambda: [release.decode(i) for i in samples],
        ],
        "mask": [
            lambda: [resize_mask(data.mask(i), data.img_size) for i in samples],
            lambda: [release.resize_mask(release.draw(i)) for i in samples],
        ],
        "of it resizing": [None, lambda: [release.resize_mask(mask) for mask in masks]],
        "resize": [
            lambda: [as_tensor(resize_image(image, data.img_size)) for image in images],
            lambda: [release.resize(image) for image in images],
        ],
        "floats, normalise": [None, lambda: [release.normalise(small[k]) for k in places]],
    }
    seconds_of: dict[str, Any] = {
        name: [way and min(timed(way)[1] for _ in range(5)) / len(samples) for way in pair]
        for name, pair in ways.items()
    }
    seconds = min(timed(lambda: normalize(batch))[1] for _ in range(5)) / len(batch)
    return seconds_of | {"on the device, here the CPU: floats, normalise": [seconds, None]}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the processor seconds that it took: other programs do not count."""
    began = time.process_time()
    result = work()
    return result, time.process_time() - began


# ---- the report ----


def tables(record: dict[str, Any]) -> str:
    """A result file as Markdown."""
    start, samples, memory = record["start"], record["samples"], record["memory"]
    megabytes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in start["files"].items())
    head = [f"start ({megabytes})", "CPU time", "CPU time of loading"]
    row = [f"{start['best'][k]:.2f} s" for k in ("wall", "cpu", "cpu_load")]
    parts = [f"{record['machine']['cpu']}, {record['machine']['cpus']} CPUs", markdown(head, [row])]

    workers = memory["arrays"]["workers"]
    head = [f"proportional memory, MB, main process + {workers} workers", "main alone"]
    head += ["before a pass", "after it", "of it a worker"]
    rows = []
    for name, title in (("arrays", "arrays"), ("dicts", "one dict per record")):
        sizes = [memory[name][k] for k in ("main_mb", "before_mb", "after_mb", "worker_after_mb")]
        rows.append([title, *(f"{size:.0f}" for size in sizes)])
    parts.append(markdown(head, rows))

    rows = []
    for name, pair in samples["steps"].items():
        shown = ["" if seconds is None else f"{1e3 * seconds:.2f}" for seconds in pair]
        rows.append([name, *shown, f"{pair[1] / pair[0]:.1f}" if None not in pair else ""])
    for name in ("training", "evaluation"):
        row = samples[name]
        shown = [f"{1e3 * row[way]:.2f}" for way in ("ours", "release")]
        title = f"**whole sample in a worker, {name}'s order**"
        rows.append([title, *shown, f"**{row['ratio']:.2f}**"])
    parts.append(markdown(["milliseconds a sample, one core", "ours", "release", "ratio"], rows))
    return "\n\n".join(parts)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All parts."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        started = measure_start(args, root)
        used = {
            "arrays": in_own_process(args, "arrays", root),
            "dicts": in_own_process(args, "dicts", root),
        }
    record = {"start": started, "memory": used, "samples": measure_samples(args)}
    host = machine() | {"load": os.getloadavg()[0]}
    return record | {"machine": host, "environment": utils.environment()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the file, print the tables."""
    args = parse(argv)
    if args.part:
        print(json.dumps(start(args) if args.part == "start" else memory(args)))
        return
    if args.report:
        texts = [Path(path).read_text(encoding="utf-8") for path in args.report]
        print("\n\n".join(tables(json.loads(text)) for text in texts))
        return
    if not args.bert_tokenizer:
        raise InputError("--bert_tokenizer is missing: give a folder with a BERT vocabulary")
    record = measure(args)
    name = slug(record["machine"]["cpu"])
    path = Path(args.output or RESULTS / f"data_{name}_{record['machine']['cpus']}cpu.json")
    utils.write_json(record, path)
    print(tables(record))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    utils.run_script(main)
