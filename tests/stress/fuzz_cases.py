"""Hostile files and command lines for tests.stress.fuzz: made from sound ones by small damage."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import os
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as save_safetensors

import args
import demo_inference
from data.refshapes.generate import generate
from lib import checkpoint
from lib.checkpoint.swin import load_swin_weights
from lib.errors import InputError
from lib.segmentation import build_model
from refer.check import Installation, as_text, examine
from refer.images import open_rgb
from refer.refer import REFER

MARKER = "pwned"  # the file that payloads make
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        cases: draws a case.
        read: does with a case what the project does with such a file, in a folder to itself;
            InputError alone may come of it.
    """

    cases: st.SearchStrategy[bytes]
    read: Callable[[bytes, Path], None]


class Payload:
    """Unpickled without care, it makes the marker."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


PAYLOADS = (
    Payload(os.system, f"touch {MARKER}"),
    Payload(eval, f"open('{MARKER}', 'w')"),
    Payload(exec, f"open('{MARKER}', 'w')"),
    Payload(getattr, Payload(__import__, "os"), "system"),
    Payload(open, MARKER, "w"),
)
# Opcodes that a pickle of refs or a checkpoint may be spiked with.
SNIPPETS = (
    b"cos\nsystem\n(S'touch " + MARKER.encode() + b"'\ntR",
    b"(S'touch " + MARKER.encode() + b"'\nios\nsystem\n",
    b"c__builtin__\neval\n(S'open(\"" + MARKER.encode() + b'","w")\'\ntR',
    b"\x8c\x02os\x8c\x06system\x93",
    b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R",
    b"r\xff\xff\xff\x7f",
    b"\x8e" + struct.pack("<Q", 1 << 60),
    b"\x95" + struct.pack("<Q", 1 << 40),
    b"\x95" + struct.pack("<Q", 6),
    b"\x8b\xff\xff\xff\x7f",
    b"I" + b"9" * 5000 + b"\n",
    b"]q\x00(" + b"h\x00" * 50 + b"e",
    b"}K\x01" + b"2\x86" * 40 + b"K\x01s",
    b"}K\x01q\x07" + b"h\x07h\x07\x86q\x07" * 40 + b"K\x01s",
    b"]" * 5000 + b"a" * 4999,
    b"Pabc\n",
    b"\x82\x01",
    b"}b",
    b"0",
    b"2",
    b"(",
    b".",
)
NUMBERS = (0, -1, 1, 3, 1 << 31, 1 << 63, -(1 << 40), 10**30, 0.5, 1e308, math.nan, math.inf)
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(NUMBERS),
    st.none(),
    st.booleans(),
    st.text(max_size=12),
    st.sampled_from(("../x", "/etc/passwd", "a\\..\\b", "a\0b", "\ud800", "x" * 3000, "")),
    st.lists(st.sampled_from(NUMBERS), max_size=9),
    st.dictionaries(st.sampled_from(("size", "counts", "id", "raw")), st.integers(), max_size=3),
    st.builds(lambda n: {"size": [12, 16], "counts": n}, st.binary(max_size=20).map(bytes.hex)),
)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Overwrite, insert, leave out, repeat or cut at a few places."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(out) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 40))
        kind = rng.randrange(6)
        if kind == 0:
            out[at : at + size] = rng.randbytes(size)
        elif kind == 1:
            out[at:at] = rng.randbytes(size)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size * 8]
        elif kind == 4:
            extreme = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80"))
            out[at : at + size] = extreme * size
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def damage_opcodes(data: bytes, rng: random.Random) -> bytes:
    """Leave out, repeat, swap, or spike opcodes of a pickle."""
    starts = [place or 0 for _, _, place in pickletools.genops(data)]
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        kind = rng.randrange(4)
        if kind == 0 and len(parts) > 1:
            del parts[at]
        elif kind == 1:
            parts.insert(at, parts[other])
        elif kind == 2:
            parts[at], parts[other] = parts[other], parts[at]
        else:
            parts.insert(at, rng.choice(SNIPPETS))
    return b"".join(parts)


def damage_value(draw: Draw, content: Any, rng: random.Random) -> Any:
    """Put hostile values at a few places of a tree of lists and dictionaries."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.85:
                node = node[key]
                continue
            kind = rng.randrange(5)
            if kind == 0:
                del node[key]
            elif kind == 1 and isinstance(node, list):
                node.extend(node[:50])
            else:
                node[key] = draw(VALUES)
            break
    return content


RANDOM = st.randoms(use_true_random=True)


class Sound:
    """The sound files that cases are made from.

    Args:
        folder: where a small data set is generated.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "sound"
        generate(self.root, level="easy", seed=3, scenes=1, val_scenes=1, test_scenes=1)
        refer = REFER(self.root)
        self.images = refer.IMAGE_DIR
        self.refs = refer.data["refs"]
        self.instances = json.loads((self.root / "refcoco" / "instances.json").read_bytes())
        self.model = build_model(
            "lavt_one", swin_type="micro", window_size=7, text_config=str(self.root / "bert")
        )


# Refs pickles


def pickles(sound: Sound) -> Target:
    """``refs(*).p``."""

    @st.composite
    def cases(draw: Draw) -> bytes:
        rng = draw(RANDOM)
        protocol, kind = rng.randrange(6), rng.randrange(4)
        if kind == 0:
            return pickle.dumps(damage_value(draw, sound.refs, rng), protocol)
        if kind == 1:
            spiked = copy.deepcopy(sound.refs)
            spiked[0]["sentences"][0][rng.choice(("raw", "tokens"))] = rng.choice(PAYLOADS)
            return pickle.dumps(spiked, protocol)
        data = pickle.dumps(sound.refs[: rng.randrange(1, 4)], protocol)
        return (damage_bytes if kind == 2 else damage_opcodes)(data, rng)

    def read(case: bytes, folder: Path) -> None:
        _read_root(_new_root(sound, folder, {"refs(unc).p": case}), sound.images)

    return Target(cases(), read)


def _new_root(sound: Sound, folder: Path, files: dict[str, bytes]) -> Path:
    """The sound data set's annotations with some replaced."""
    (folder / "refcoco").mkdir(exist_ok=True)
    for name in ("refs(unc).p", "instances.json"):
        source = sound.root / "refcoco" / name
        (folder / "refcoco" / name).write_bytes(files.get(name) or source.read_bytes())
    return folder


def _read_root(root: Path, images: Path) -> None:
    as_text(examine(Installation(root, image_root=images), decode=True))
    refer = REFER(root, image_root=images)
    for ref in refer.loadRefs(refer.getRefIds(split=refer.splits()[0]) if refer.splits() else []):
        refer.getMask(ref)
        refer.showRef(ref, "box")


# instances.json


def instances(sound: Sound) -> Target:
    """``instances.json``."""

    @st.composite
    def cases(draw: Draw) -> bytes:
        rng = draw(RANDOM)
        if rng.random() < 0.25:
            return damage_bytes(json.dumps(sound.instances).encode(), rng)
        return json.dumps(damage_value(draw, sound.instances, rng)).encode()

    def read(case: bytes, folder: Path) -> None:
        _read_root(_new_root(sound, folder, {"instances.json": case or b" "}), sound.images)

    return Target(cases(), read)


# Checkpoints

TENSORS = {"w": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16), "n": torch.tensor(3)}


def checkpoints(sound: Sound) -> Target:
    """Files for --resume and --pretrained_swin_weights; the first byte chooses the ending."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 3)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = argparse.Namespace(lr=1.0, mha="", img_size=480)
    content = {
        "model": TENSORS,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "args": options,
    }

    @st.composite
    def cases(draw: Draw) -> bytes:
        rng, kind = draw(RANDOM), draw(st.integers(0, 9))
        if kind == 0:
            return b"s" + damage_bytes(save_safetensors(TENSORS), rng)
        if kind == 1:
            return b"p" + _saved({**content, rng.choice(list(content)): rng.choice(PAYLOADS)}, rng)
        if kind == 2:
            plain = content | {"args": vars(options)}
            return b"p" + _saved(damage_value(draw, plain, rng), rng)
        data = _saved(content, rng)
        if kind < 6 or not data.startswith(b"PK"):
            return b"p" + damage_bytes(data, rng)
        return b"p" + _damage_zip(data, rng)

    def read(case: bytes, folder: Path) -> None:
        path = folder / ("x.safetensors" if case[:1] == b"s" else "x.pth")
        path.write_bytes(case[1:])
        found = checkpoint.read_checkpoint(path)
        args.compare_args(found.get("args"), options)
        for use in (
            lambda: checkpoint.load_training(found, path, optimizer, schedule),
            lambda: checkpoint.load_model(sound.model, found, path),
            lambda: load_swin_weights(sound.model, str(path)),
        ):
            with contextlib.suppress(InputError):
                use()

    return Target(cases(), read)


def _saved(content: Any, rng: random.Random) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=rng.random() < 0.7)
    return out.getvalue()


def _damage_zip(data: bytes, rng: random.Random) -> bytes:
    """Damage a member, its name or how it is packed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        members = [(m.filename, old.read(m)) for m in old.infolist()]
        at, kind = rng.randrange(len(members)), rng.randrange(5)
        for i, (name, part) in enumerate(members):
            if kind < 2 and name.endswith("data.pkl"):
                part = (damage_opcodes if kind == 0 else damage_bytes)(part, rng)
            elif kind == 2 and i == at:
                part = damage_bytes(part, rng)
            elif kind == 3 and i == at:
                name = rng.choice((name.upper(), members[0][0], "../x", name + "/constants.pkl"))
            packed = kind == 4 and i == at
            new.writestr(name, part, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
    return out.getvalue()


# Pictures


def images(sound: Sound) -> Target:
    """Pictures of all formats, under any ending."""
    ramp = np.arange(24 * 20 * 3, dtype=np.uint8).reshape(24, 20, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = []
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        for mode in ("RGB", "L", "P", "CMYK", "I", "F"):
            out = io.BytesIO()
            with contextlib.suppress(OSError, ValueError, KeyError):
                options: dict[str, Any] = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
                if kind == "JPEG":
                    options["progressive"] = mode == "L"
                if kind == "TIFF":
                    options["compression"] = {"L": "tiff_lzw", "RGB": "jpeg"}.get(mode)
                Image.fromarray(ramp).convert(mode).save(out, kind, **options)
                whole.append(out.getvalue())

    @st.composite
    def cases(draw: Draw) -> bytes:
        rng = draw(RANDOM)
        data = bytearray(rng.choice(whole))
        if rng.random() < 0.3:  # sizes stand in the first bytes
            at = rng.randrange(4, 40)
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.randrange(1 << 32))
        if rng.random() < 0.1:
            data += rng.choice(whole)
        return damage_bytes(bytes(data), rng) if rng.random() < 0.9 else bytes(data)

    def read(case: bytes, folder: Path) -> None:
        path = folder / "x.jpg"
        path.write_bytes(case)
        open_rgb(path)
        demo_inference.open_upright(path)

    return Target(cases(), read)


# Command lines

OPTIONS = """
    --model --swin_type --window12 --mha --fusion_drop --ape --dataset --splitBy --split --img_size
    --refer_data_root --image_root --ck_bert --bert_tokenizer --resume --batch-size -b -j --workers
    --epochs --lr --wd --seed --device --amp --print-freq --model_id --output-dir --lang_layers
    --pretrained_swin_weights --local_rank --local-rank --loss --drop_path --eval_every --list
    --save-every --clip_grad --accumulate --stop_after --val_split --results --control --image
    --sentence --output --mask --rle --help lavt crossvlt micro base refcoco+ umd val 1-1-1-1 cpu
"""
WORDS = OPTIONS.split()
ODD = """
    nan inf -inf -1 0 1e400 1e-400 ² ٣ 0x10 1_000 99999999999999999999 a-b-c-d 1-2-3 -0 -- - =
    ../x / ~ * $HOME `id` ;touch
"""
ODDITIES = (
    *ODD.split(),
    "",
    "\0",
    "\ud800",
    "x" * 3000,
    "9" * 5000 + "m",
    "a\nb",
    "\x1b[2J",
    "9" * 5000,
)
PARSERS: tuple[Callable[[Sequence[str]], Any], ...] = (
    args.parse_train,
    args.parse_test,
    args.parse_demo,
)
STARTS: tuple[list[str], ...] = (
    [],
    ["--resume", "x.pth"],
    ["--image", "x.jpg", "--sentence", "a", "--resume", "x.pth"],
    ["--list", "x.json", "--resume", "x.pth"],
)


def cli(sound: Sound) -> Target:
    """Command lines of train.py, test.py and demo_inference.py, and a list for the last."""

    @st.composite
    def cases(draw: Draw) -> bytes:
        rng = draw(RANDOM)
        which = rng.randrange(len(PARSERS))
        argv = list(rng.choice(STARTS[which:]))
        for _ in range(rng.randrange(7)):  # none: a sound command line
            odd = draw(st.text(max_size=6)) if rng.random() < 0.2 else rng.choice(ODDITIES)
            argv.append(rng.choice(WORDS))
            argv += [odd if rng.random() < 0.6 else rng.choice(WORDS)] if rng.random() < 0.7 else []
        entries = [{"image": "x.jpg", "sentence": ["a", "b"]}, {"image": "y.png", "sentence": "c"}]
        listed = json.dumps(damage_value(draw, entries, rng))
        return json.dumps({"parser": which, "argv": argv, "list": listed}).encode()

    def read(case: bytes, folder: Path) -> None:
        content = json.loads(case)
        (folder / "x.json").write_bytes(content["list"].encode())
        (folder / "x.jpg").write_bytes(b"x")
        options = argparse.Namespace(list="x.json", image="", sentence=[], output="out")
        with contextlib.suppress(InputError):
            demo_inference.plan(demo_inference.read_requests(options), Path(options.output))
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            PARSERS[content["parser"]](content["argv"])

    return Target(cases(), read)


TARGETS: dict[str, Callable[[Sound], Target]] = {
    "pickles": pickles,
    "instances": instances,
    "checkpoints": checkpoints,
    "images": images,
    "cli": cli,
}
