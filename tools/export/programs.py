"""Programs of torch.export and ONNX models from a trained model."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import utils
from data.transforms import MEAN, STD
from lib.checkpoint.rebuild import Trained
from lib.errors import InputError
from lib.model import Segmenter
from tools.export.check import Run, compare, read_samples, tensor_of
from utils import log

INPUTS = ("image", "input_ids", "attention_mask")
BATCH = {0: torch.export.Dim("batch", min=1)}
SHAPES = dict.fromkeys(INPUTS, BATCH)
# BERT's words: a punctuation mark, a Chinese character, or what is between them.
MARKS = r"!-/:-@\[-`{-~\u00a1\u00a7\u00ab\u00b6\u00b7\u00bb\u00bf\u2010-\u2027\u2030-\u205e"
MARKS += r"\u3001-\u3003\u3008-\u3011"
WORD = rf"[{MARKS}\u4e00-\u9fff]|[^\s{MARKS}\u4e00-\u9fff]+"
REMEDY = "pip install -r requirements-tools.txt -c constraints.txt"


def trace(model: Segmenter, img_size: int, max_tokens: int) -> torch.export.ExportedProgram:
    """The model as a program of torch.export, for any batch size.

    The image's size is fixed: Swin's padding and windows make it a condition of the program.

    Args:
        model: in eval mode, on the CPU.
        img_size, max_tokens: side of the image, and N_l.
    """
    example = (
        torch.zeros(2, 3, img_size, img_size),
        torch.zeros(2, max_tokens, dtype=torch.long),
        torch.ones(2, max_tokens, dtype=torch.long),
    )
    with torch.no_grad(), plain_attention():
        # The masks of shifted windows are then known, and become constants. Without this, the
        # trace would leave tensors without data where the model keeps them.
        model(*(t[:1] for t in example))
        return torch.export.export(model, example, dynamic_shapes=SHAPES, strict=False)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Trace attention by its definition: a kernel's order in memory would become part of views."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def export_torch(trained: Trained, args: argparse.Namespace) -> None:
    """Write a .pt2 file of torch.export, checked, with its .check.json.

    Raises:
        InputError: it cannot be written, or computes something else.
    """
    output = Path(args.output)
    utils.make_folder(output.parent)
    samples = read_samples(trained, args.images)
    log.info("exporting at %d pixels", trained.settings["img_size"])
    program = trace(trained.model, trained.settings["img_size"], trained.settings["max_tokens"])
    # torch.export.save expects the ending.
    partial = output.with_name(output.stem + ".partial.pt2")
    try:
        with written(output):
            torch.export.save(program, partial)
        report = compare(samples, load_torch(partial), args.batch)
        with written(output):
            os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    utils.write_json(settings_of(trained, "torch") | report, checked(output))
    log.info("written: %s", output)


def load_torch(path: Path) -> Run:
    """A .pt2 file as a function of the three inputs."""
    module = torch.export.load(path).module()
    return lambda *inputs: module(*inputs)


def export_onnx(trained: Trained, args: argparse.Namespace) -> None:
    """Write a folder with model.onnx, vocab.txt and settings.json, checked by onnxruntime.

    Raises:
        InputError: a package is missing, it cannot be written, or computes something else.
    """
    require_onnx()
    folder = Path(args.output)
    words = vocabulary(trained)
    samples = read_samples(trained, args.images)
    utils.make_folder(folder)
    partial = folder / ".partial"
    try:
        with written(folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        log.info("exporting at %d pixels: some minutes", trained.settings["img_size"])
        program = trace(trained.model, trained.settings["img_size"], trained.settings["max_tokens"])
        with written(folder):
            write_onnx(program, partial / "model.onnx")
        report = compare(samples, load_onnx(partial / "model.onnx"), args.batch)
        utils.write_text("\n".join(words) + "\n", partial / "vocab.txt")
        utils.write_json(settings_of(trained, "onnx"), partial / "settings.json")
        utils.write_json(report, checked(partial / "model.onnx"))
        with written(folder):
            for path in partial.iterdir():
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("written: %s", folder)


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program as ONNX; beyond 2 GB the weights are in a file beside it."""
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    # About constants that it cannot fold.
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with plain_attention(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names of axes
        found = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_shapes=SHAPES,
            verbose=False,
        )
    if found is None:
        raise InputError("torch.onnx.export gave no program")
    found.save(str(path), external_data=size > 1.5e9)


def load_onnx(path: Path, threads: int | None = None) -> Run:
    """An ONNX file, run by onnxruntime on the CPU, as a function of the three inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        feed = {name: t.numpy() for name, t in zip(INPUTS, inputs, strict=True)}
        return tensor_of(session.run(["logits"], feed)[0])

    return run


def require_onnx() -> None:
    """Check that the packages of ONNX are installed.

    Raises:
        InputError: one is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise InputError(f"--format onnx needs the package {e.name}: {REMEDY}") from e


def vocabulary(trained: Trained) -> list[str]:
    """The words of the tokenizer in the order of their ids.

    Raises:
        InputError: an id is missing, so that a line's number would not be its id.
    """
    words = sorted(trained.tokenizer.get_vocab().items(), key=lambda item: item[1])
    if [number for _, number in words] != list(range(len(words))):
        raise InputError("the tokenizer's ids have gaps: its vocabulary cannot be a list of words")
    return [word for word, _ in words]


def settings_of(trained: Trained, kind: str) -> dict[str, Any]:
    """What a program must know to prepare the inputs."""
    return {
        "format": kind,
        "model": trained.settings["model"],
        "img_size": trained.settings["img_size"],
        "resize": "to a square, PIL's bilinear",
        "mean": MEAN,
        "std": STD,
        "max_tokens": trained.settings["max_tokens"],
        "do_lower_case": lowers(trained),
        "word_pattern": WORD,
    }


def lowers(trained: Trained) -> bool:
    """Whether the tokenizer makes capitals small and removes accents."""
    normalizer = trained.tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("AÉ") == "ae"


def checked(path: Path) -> Path:
    """The name of the check's result, beside an exported file."""
    return path.with_name(path.name + ".check.json")


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn errors of writing into one line.

    Raises:
        InputError: it cannot be written.
    """
    try:
        yield
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e
