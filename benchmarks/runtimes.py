"""How fast a model is in other runtimes: PyTorch, lib.cpu, torch.export and ONNX Runtime.

    python -m benchmarks.runtimes
    python -m benchmarks.runtimes --models lavt:micro:7:112 --repeats 20
    python -m benchmarks.runtimes --report benchmarks/results/runtimes_*.json   # the table again

A forward pass of one image and expression on the CPU, with random weights. The runtimes take
turns, so that a busy neighbour slows all of them; the median of each and its ratio to eager are
shown. Prints a table (Markdown) and writes a JSON file.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

import utils
from args import Parser
from benchmarks.pages import markdown, put_between
from benchmarks.speed import machine, slug
from lib import cpu
from lib.errors import InputError
from lib.segmentation import MODELS, build_model
from lib.swin import SWIN_SIZES
from tools.export.programs import load_onnx, load_torch, require_onnx, trace, write_onnx

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "other_runtimes.md"
MARKS = ("<!-- table: benchmarks.runtimes -->", "<!-- end of benchmarks.runtimes -->")
NAMES = {
    "eager": "PyTorch, eager",
    "accelerated": "PyTorch, `lib/cpu`",
    "torch": "torch.export",
    "onnx": "ONNX Runtime",
}
# The text encoder of the quickstart, for its Swin; others have bert-base.
SMALL_TEXT: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_TEXT |= {"intermediate_size": 512}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's options.

    Raises:
        InputError: an unknown model.
    """
    p = Parser(prog="benchmarks.runtimes", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument(
        "--models",
        default="lavt:base:12:480,lavt:micro:7:112",
        help="comma-separated name:swin:window:side",
    )
    p.add_argument("--repeats", type=int, default=5, help="of each runtime")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--output", help="JSON file, by default results/runtimes_<machine>.json")
    p.add_argument("--report", nargs="+", metavar="JSON", help="print the tables of such files")
    p.add_argument("--page", action="store_true", help="put the tables into docs, too")
    args = p.parse_args(argv)
    for text in args.models.split(","):
        match = re.fullmatch(r"(\w+):(\w+):(\d+):(\d+)", text)
        if not match or match[1] not in MODELS or match[2] not in SWIN_SIZES:
            raise InputError(f"--models {text}: give name:swin:window:side, as lavt:base:12:480")
    if args.repeats < 1:
        raise InputError(f"--repeats {args.repeats}: must be above 0")
    return args


def measure(name: str, repeats: int, threads: int) -> dict[str, Any]:
    """The seconds of each runtime for one model.

    Args:
        name: name:swin:window:side.
        repeats: timed passes of each runtime.
        threads: of PyTorch and ONNX Runtime.
    """
    kind, swin, window, side = name.split(":")
    size, max_tokens = int(side), MODELS[kind].max_tokens
    torch.manual_seed(0)
    model = build_model(
        kind,
        swin_type=swin,
        window_size=int(window),
        text_config=BertConfig(**(SMALL_TEXT if swin == "micro" else {})),
        accelerate=False,
    ).eval()
    inputs = (
        torch.randn(1, 3, size, size),
        torch.randint(1000, 2000, (1, max_tokens)),
        torch.ones(1, max_tokens, dtype=torch.long),
    )
    runs: dict[str, Callable[..., torch.Tensor]] = {"eager": model}
    if cpu.pays():
        runs["accelerated"] = cpu.accelerate(copy.deepcopy(model))
    began = time.perf_counter()
    program = trace(model, size, max_tokens)
    exported = {"torch": time.perf_counter() - began}
    with tempfile.TemporaryDirectory() as folder:
        files = {"torch": Path(folder) / "model.pt2", "onnx": Path(folder) / "model.onnx"}
        torch.export.save(program, files["torch"])
        began = time.perf_counter()
        write_onnx(program, files["onnx"])
        exported["onnx"] = time.perf_counter() - began
        runs["torch"] = load_torch(files["torch"])
        runs["onnx"] = load_onnx(files["onnx"], threads)
        times = timed({key: partial(run, *inputs) for key, run in runs.items()}, repeats)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        "name": name,
        "repeats": repeats,
        "threads": threads,
        "export_seconds": exported,
        "seconds": times,
        "median_seconds": medians,
        "ratio_to_eager": {key: medians["eager"] / value for key, value in medians.items()},
    }


@torch.inference_mode()
def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, turn by turn, after one that does not count."""
    times: dict[str, list[float]] = {key: [] for key in runs}
    for turn in utils.progress(range(repeats + 1), "turns", 0):
        for key, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                times[key].append(time.perf_counter() - began)
    return times


def table(record: dict[str, Any]) -> str:
    """A result file as Markdown."""
    rows, host, versions = record["rows"], record["machine"], record["environment"]
    threads = rows[0]["threads"]
    where = f"{host['cpu']}, {threads} thread{'s' * (threads > 1)}; PyTorch {versions['torch']}"
    lines = []
    for row in rows:
        model, swin, window, side = row["name"].split(":")
        for key, seconds in row["median_seconds"].items():
            title = f"{model} {swin}, window {window}, {side} px"
            ratio = row["ratio_to_eager"][key]
            lines.append([title, NAMES[key], f"{seconds:.3f}", f"{ratio:.2f}"])
    head = ["model", "runtime", "seconds an image", "times as fast as eager"]
    return f"{where}, ONNX Runtime {record['onnxruntime']}.\n\n{markdown(head, lines)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the file, print the table."""
    args = parse(argv)
    if args.report:
        records = [json.loads(Path(path).read_text(encoding="utf-8")) for path in args.report]
    else:
        require_onnx()
        import onnxruntime

        torch.set_num_threads(args.threads)
        rows = [measure(name, args.repeats, args.threads) for name in args.models.split(",")]
        host = machine()
        record = {"rows": rows, "machine": host, "environment": utils.environment()}
        record["onnxruntime"] = onnxruntime.__version__
        name = slug(f"{host['cpu']} {args.threads}")
        utils.write_json(record, args.output or RESULTS / f"runtimes_{name}.json")
        records = [record]
    tables = "\n\n".join(map(table, records))
    print(tables)
    if args.page:
        put_between(PAGE, MARKS, f"\n{tables}\n")


if __name__ == "__main__":
    utils.run_script(main)
