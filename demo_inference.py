"""Cut out of a photo what a sentence refers to.

python demo_inference.py --image photo.jpg --sentence "the dog on the left" --resume CKPT
python demo_inference.py --image FOLDER --sentence "dog" "cat" --resume CKPT --output DIR
python demo_inference.py --list pairs.json --resume CKPT --output DIR --caption --mask --rle --prob
python demo_inference.py ... --attention

The model sees what it saw in training: the photo resized to a square of --img_size. Its logits
are resized back to the photo's own size, bilinearly, and the mask is their argmax there. All
files are of the photo's own size. A camera's EXIF orientation is applied first, so that "left"
is what a person sees on the left; masks then are of the upright photo. (Training and test.py do
not apply it: annotations are in the file's own pixel coordinates.)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import utils
from args import model_options, parse_demo, speed_options
from bert import encode, load_tokenizer
from bert.tokenizer import Tokenizer
from data import loaders
from data.transforms import as_tensor, resize_image
from lib import checkpoint, runtime
from lib.attention import attention_figure, fusions, word_attention
from lib.errors import InputError
from lib.evaluation.evaluator import resize_prediction
from lib.model import Segmenter
from lib.segmentation import build_model
from lib.visualize import WRITABLE, overlay, printable, write_picture
from refer.images import open_rgb
from refer.masks import run_lengths
from utils import log

READABLE = (*WRITABLE, ".gif", ".ppm")
MAX_LIST = 64 << 20  # bytes of --list
SHOWN = 40  # characters of a name or sentence in the table


@dataclass(frozen=True)
class Job:
    """A photo, what is asked about it, and where each answer's overlay goes."""

    photo: Path
    sentences: tuple[str, ...]
    overlays: tuple[Path, ...]


def load(args: argparse.Namespace, device: torch.device) -> tuple[Segmenter, Tokenizer]:
    """The checkpoint's model in eval mode, and its tokenizer.

    Raises:
        InputError: the checkpoint, the text configuration or the vocabulary cannot be used.
    """
    content = checkpoint.read_checkpoint(args.resume)
    model = build_model(args.model, **model_options(args))
    checkpoint.load_model(model, content, args.resume)
    runtime.prepare(model.to(device).eval(), **speed_options(args))
    return model, load_tokenizer(args.bert_tokenizer)


@torch.inference_mode()
def predict(
    model: Segmenter,
    tokenizer: Tokenizer,
    photo: Image.Image,
    sentences: Sequence[str],
    img_size: int,
    max_tokens: int,
    batch_size: int = 8,
    amp: str = "off",
) -> Tensor:
    """Run the model on one photo; its sentences share batches.

    Args:
        model: in eval mode, on any device.
        tokenizer: of its text encoder.
        photo: RGB.
        sentences: N texts.
        img_size: side S of the square that the model sees, pixels.
        max_tokens: N_l, where a sentence is cut.
        batch_size: most sentences in one forward pass.
        amp: see :func:`lib.runtime.autocast`.

    Returns:
        (N, 2, S, S) float32 logits, on the model's device.
    """
    device = next(model.parameters()).device
    ids, attention = encode(tokenizer, sentences, max_tokens)
    image = as_tensor(resize_image(photo, img_size))[None]
    logits = []
    for part, mask in zip(ids.split(batch_size), attention.split(batch_size), strict=True):
        batch = {"image": image, "input_ids": part, "attention_mask": mask}
        batch = loaders.to_device(batch, device)
        pictures = batch["image"].expand(len(part), -1, -1, -1)
        with runtime.autocast(device, amp):
            out = model(pictures, batch["input_ids"], batch["attention_mask"])
        logits.append(out.float())
    return torch.cat(logits)


def open_upright(path: Path) -> Image.Image:
    """Open a photo as RGB, the way up that its EXIF orientation asks for.

    Raises:
        InputError: missing, not a picture, damaged or too large.
    """
    photo = open_rgb(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on damaged metadata
            return ImageOps.exif_transpose(photo)
    except Exception:  # damaged further, for which PIL raises many kinds: the pixels are fine
        return photo


def read_requests(args: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """Photos and what is asked about each, from the command line or its list.

    Raises:
        InputError: no such photo or folder, none in the folder, or a list that is none.
    """
    if args.list:
        return _read_list(Path(args.list))
    source = Path(args.image)
    if not source.is_dir():
        if not source.is_file():
            raise InputError(f"--image {source} does not exist: give a photo or a folder of photos")
        return [(source, args.sentence)]
    if source.resolve() == Path(args.output).resolve():
        raise InputError(f"--output {source} is the photos' own folder: give another")
    try:
        files = sorted(p for p in source.iterdir() if p.is_file() and not p.name.startswith("."))
    except OSError as e:
        raise InputError(f"--image {source} cannot be listed: {e.strerror}") from e
    photos = [p for p in files if p.suffix.lower() in READABLE]
    if not photos:
        raise InputError(f"no photo in the folder {source} ({', '.join(READABLE)} are read)")
    return [(photo, args.sentence) for photo in photos]


def _read_list(path: Path) -> list[tuple[Path, list[str]]]:
    shape = '[{"image": "photo.jpg", "sentence": "the dog" or ["the dog", "the cat"]}, ...]'
    try:
        if path.stat().st_size > MAX_LIST:
            raise InputError(f"--list {path} has over {MAX_LIST >> 20} MB: cut it into several")
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as e:
        raise InputError(f"--list {path} does not exist: give a JSON file like {shape}") from e
    except OSError as e:
        raise InputError(f"--list {path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"--list {path} is no JSON ({str(e)[:80]}): it takes {shape}") from e
    if not isinstance(entries, list) or not entries:
        raise InputError(f"--list {path} holds no list of entries: it takes {shape}")
    requests = []
    for number, entry in enumerate(entries, 1):
        request = _entry(entry)
        if request is None:
            raise InputError(f"--list {path}, entry {number} is not of the form {shape[1:-6]}")
        requests.append((path.parent / request[0], request[1]))
    return requests


def _entry(entry: Any) -> tuple[str, list[str]] | None:
    """Photo and sentences of a list's entry; None where it is not of the right form."""
    if not isinstance(entry, dict):
        return None
    image, said = entry.get("image"), entry.get("sentence")
    sentences = [said] if isinstance(said, str) else said
    if not isinstance(image, str) or not image or "\0" in image:
        return None
    if image != image.encode("utf-8", "replace").decode():  # no file can be called so
        return None
    if not isinstance(sentences, list) or not sentences:
        return None
    return (image, sentences) if all(isinstance(s, str) for s in sentences) else None


def plan(requests: Iterable[tuple[Path, list[str]]], output: Path) -> list[Job]:
    """Decide where each overlay goes, before anything is computed.

    Args:
        requests: photos and their sentences.
        output: a file for a single overlay, otherwise a folder, where an overlay is named
            after photo and sentence.

    Returns:
        A job for each request.

    Raises:
        InputError: a photo would be overwritten, one file is to hold several overlays, or the
            folder cannot be made.
    """
    requests = list(requests)
    to_file = bool(_picture_ending(output)) and not output.is_dir()
    count = sum(len(sentences) for _, sentences in requests)
    if to_file and count > 1:
        raise InputError(f"--output {output} is one file for {count} overlays: give a folder")
    taken: set[str] = set()
    jobs = []
    for photo, sentences in requests:
        paths = [
            output if to_file else output / _new_name(f"{_cut(photo.stem, 100)}_{_slug(s)}", taken)
            for s in sentences
        ]
        jobs.append(Job(photo, tuple(sentences), tuple(paths)))
    _protect(jobs)
    folder = output.parent if to_file else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--output {output} cannot be made: {e.strerror}") from e
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {output}: no permission to write there")
    return jobs


def _picture_ending(path: Path) -> str:
    """The ending of a picture file, '' of anything else."""
    ending = path.suffix.lower()
    if ending in Image.registered_extensions() and ending not in WRITABLE:
        raise InputError(f"--output {path}: overlays are written as {', '.join(WRITABLE)}")
    return ending if ending in WRITABLE else ""


def _slug(sentence: str) -> str:
    return _cut(re.sub(r"\W+", "-", printable(sentence).lower()), 60).strip("-") or "sentence"


def _cut(text: str, size: int) -> str:
    """The first ``size`` bytes of a text: file systems count bytes, not letters."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")


def _new_name(stem: str, taken: set[str]) -> str:
    """A name no other overlay has, also where names do not tell capitals apart."""
    name, number = stem, 1
    while name.lower() in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name.lower())
    return f"{name}.png"


def side_files(path: Path) -> dict[str, Path]:
    """Where mask, RLE, probability map and attention go, beside an overlay."""
    endings = {"mask": ".mask.png", "rle": ".rle.json", "prob": ".prob.png"}
    endings["attention"] = ".attention.png"
    return {kind: path.with_name(path.stem + ending) for kind, ending in endings.items()}


def _protect(jobs: Sequence[Job]) -> None:
    """Refuse to write over a photo."""
    photos = {job.photo.resolve() for job in jobs}
    for job in jobs:
        for path in job.overlays:
            if photos & {p.resolve() for p in (path, *side_files(path).values())}:
                raise InputError(f"--output {path} would overwrite a photo: give another")


def answer(job: Job, photo: Image.Image, logits: Tensor, args: argparse.Namespace) -> list[float]:
    """Write the files of a job.

    Args:
        job: N sentences.
        photo: of the job, upright.
        logits: (N, 2, S, S), of :func:`predict`.
        args: which files, and whether with a caption.

    Returns:
        Share of the photo that each mask covers, in [0, 1].

    Raises:
        InputError: a file cannot be written.
    """
    shares = []
    for sentence, path, of_sentence in zip(job.sentences, job.overlays, logits, strict=True):
        found = resize_prediction(of_sentence, photo.height, photo.width)
        drawn = overlay(photo, found.mask, sentence if args.caption else None)
        write_picture(drawn, path)
        files = side_files(path)
        if args.mask:
            write_picture(
                Image.fromarray(found.mask.astype(np.uint8) * np.uint8(255)), files["mask"]
            )
        if args.rle:
            utils.write_json(run_lengths(found.mask), files["rle"])
        if args.prob:
            deep = np.rint(found.probability.astype(np.float64) * 65535).astype(np.uint16)
            write_picture(Image.fromarray(deep), files["prob"])
        shares.append(float(found.mask.mean()))
    return shares


@torch.inference_mode()
def explain(
    job: Job,
    photo: Image.Image,
    logits: Tensor,
    model: Segmenter,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
) -> None:
    """Write the attention figures of a job; the other arguments are those of :func:`predict`.

    Raises:
        InputError: a file cannot be written.
    """
    device = next(model.parameters()).device
    image = as_tensor(resize_image(photo, args.img_size))[None]
    for sentence, path, of_sentence in zip(job.sentences, job.overlays, logits, strict=True):
        ids, mask = encode(tokenizer, [sentence], args.max_tokens)
        batch = {"image": image, "input_ids": ids, "attention_mask": mask}
        maps = word_attention(model, **loaders.to_device(batch, device))
        real = int(mask.sum())
        figure = attention_figure(
            photo,
            overlay(photo, resize_prediction(of_sentence, photo.height, photo.width).mask),
            tokenizer.convert_ids_to_tokens(ids[0, :real].tolist()),
            [m[0, :real].float().cpu().numpy() for m in maps],
            printable(sentence),
        )
        write_picture(figure, side_files(path)["attention"])


def _table(jobs: Sequence[Job]) -> Callable[..., str]:
    """How to print a row of the table; all names are known beforehand, so that columns line up."""
    photos = max(len(_short(job.photo.name)) for job in jobs)
    sentences = max(len(_short(s)) for job in jobs for s in job.sentences)
    widths = max(photos, len("photo")), max(sentences, len("sentence"))

    def row(photo: str, sentence: str, share: str, written: object) -> str:
        columns = f"{_short(photo):<{widths[0]}}  {_short(sentence):<{widths[1]}}"
        return f"{columns}  {share:>8}  {printable(str(written))}"

    return row


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def warn_of_long(tokenizer: Tokenizer, sentences: Iterable[str], max_tokens: int) -> None:
    """Say which sentences the model will not read to the end."""
    for sentence in sorted(set(sentences)):
        if encode(tokenizer, [sentence], max_tokens + 1)[1].sum() > max_tokens:
            log.warning(
                'warning: the model reads %d tokens, not to the end of "%s"',
                max_tokens,
                _short(sentence),
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Answer the sentences of the command line."""
    args = parse_demo(argv)
    jobs = plan(read_requests(args), Path(args.output))
    info = utils.init_distributed(args.device, args.local_rank)
    utils.setup_logging(None, info.rank)
    model, tokenizer = load(args, info.device)
    if args.attention:
        fusions(model)  # has none: said before anything is written
    warn_of_long(tokenizer, (s for job in jobs for s in job.sentences), args.max_tokens)
    row = _table(jobs)
    log.info("%s", row("photo", "sentence", "covered", "overlay"))
    unread = 0
    for job in jobs:
        try:
            photo = open_upright(job.photo)
        except InputError as e:
            if len(jobs) == 1:
                raise
            print(f"error: {e}", file=sys.stderr, flush=True)
            unread += 1
            continue
        logits = predict(
            model,
            tokenizer,
            photo,
            job.sentences,
            args.img_size,
            args.max_tokens,
            args.batch_size,
            args.amp,
        )
        shares = answer(job, photo, logits, args)
        if args.attention:
            explain(job, photo, logits, model, tokenizer, args)
        for sentence, path, share in zip(job.sentences, job.overlays, shares, strict=True):
            log.info("%s", row(job.photo.name, sentence, f"{share:.2%}", path))
            if not share:
                log.warning(
                    'warning: nothing in %s is "%s" to the model: the mask is empty',
                    printable(job.photo.name),
                    _short(sentence),
                )
    if unread:
        print(f"error: {unread} of {len(jobs)} photos could not be read", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    utils.run_script(main)
