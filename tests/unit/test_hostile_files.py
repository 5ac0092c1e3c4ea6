"""Files of strangers: nothing in them is run, and they cost what their size allows."""

from __future__ import annotations

import copyreg
import io
import json
import math
import os
import pickle
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import demo_inference
from bert import load_bert, load_config, load_tokenizer
from lib.checkpoint import describe, flat_state, load_model, load_training, read_checkpoint
from lib.checkpoint.swin import load_swin_weights
from lib.errors import LONGEST, InputError
from refer import REFER
from refer.check import Installation, examine
from refer.images import open_rgb
from refer.masks import draw_components
from refer.pickles import load_refs
from tests.cage import (
    MARKER,
    PAYLOADS,
    refusal,
    test_the_cage_holds,  # noqa: F401  (collected here)
)
from tests.conftest import Build
from tests.refer_files import TINY_BERT, default_instances, default_refs, make_ref, write_root

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the cage needs Linux")

# Refs pickles


def refused_pickle(data: bytes, folder: Path) -> str:
    path = folder / "refs(x).p"
    path.write_bytes(data)
    message = refusal(lambda: load_refs(path), folder)
    assert str(path) in message
    return message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_in_refs(tmp_path: Path, name: str, protocol: int) -> None:
    refs: Any = default_refs()
    refs[0]["sentences"][0]["tokens"] = PAYLOADS[name]
    assert "refused" in refused_pickle(pickle.dumps(refs, protocol), tmp_path)


class WithState:
    """Runs code when its state is set."""

    def __setstate__(self, state: Any) -> None:
        Path(MARKER).touch()

    def __getstate__(self) -> Any:
        return {"a": 1}


def test_objects_in_refs(tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 0xF0)
    try:
        call = b"\x82\xf0X\x0b\x00\x00\x00touch pwned\x85R."
        assert "refused" in refused_pickle(b"\x80\x02" + call, tmp_path)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    for protocol in range(6):
        assert "refused" in refused_pickle(pickle.dumps([WithState()], protocol), tmp_path)


def long_string(size: int) -> bytes:
    return b"X" + struct.pack("<I", size) + b"a" * size


CALL = b"c_codecs\nencode\n"
LATIN = b"X\x06\x00\x00\x00latin1"
SENTENCE = {"sent_id": 1, "raw": "a b " * (1 << 16)}
UNFOLDING = {
    "bytes, again and again": b"\x80\x04B"
    + struct.pack("<I", 1 << 20)
    + b"a" * (1 << 20)
    + b"q\x000]("
    + b"h\x00" * 20_000
    + b"e.",
    "a call, again and again": CALL
    + b"q\x000"
    + long_string(1 << 20)
    + b"q\x010"
    + b"]("
    + (b"h\x00h\x01" + LATIN + b"\x86R") * 5_000
    + b"e.",
    "dictionaries, again and again": pickle.dumps(
        [dict.fromkeys(map(str, range(1000)))] * 60_000, 2
    ),
    "sentences, again and again": pickle.dumps(
        [make_ref(1, 1, 1, "train", []) | {"sentences": [SENTENCE] * 5000}], 2
    ),
    "empty dictionaries": b"\x80\x02(" + b"}" * (8 << 20) + b"l.",
    "empty lists": b"(" + b"]" * (8 << 20) + b"l.",
    "marks": b"(" * (8 << 20) + b".",
    "a frame over the end of another": b"\x80\x04\x95"
    + struct.pack("<Q", 12)
    + b"]\x95"
    + struct.pack("<Q", 20)
    + b"N" * 30
    + b".",
    "a frame within a frame": b"\x80\x04\x95"
    + struct.pack("<Q", 20)
    + b"N\x95"
    + struct.pack("<Q", 4)
    + b"N" * 40
    + b".",
    "a string over the end of a frame": b"\x80\x04\x95"
    + struct.pack("<Q", 4)
    + b"X\x04\x00\x00\x00aaaa"
    + b"].",
}


@pytest.mark.parametrize("name", UNFOLDING)
def test_refs_that_unfold(tmp_path: Path, name: str) -> None:
    refused_pickle(UNFOLDING[name], tmp_path)


@pytest.mark.parametrize(
    "twice",
    [b"2\x86", b"q\x00h\x00\x86", b"q\x000(h\x00h\x00h\x00t", b"q\x00h\x00\x86\x94"],
    ids=["dup", "memo", "mark", "memoize"],
)
def test_tuples_of_tuples_are_not_hashed(tmp_path: Path, twice: bytes) -> None:
    """With each level the time doubles: sixty are for ever, and no signal interrupts it."""
    data = b"\x80\x04}K\x01K\x01\x86" + twice * 60 + b"K\x01s."
    assert "tuple" in refused_pickle(data, tmp_path) or b"2" in twice


def test_shared_records_are_sound(tmp_path: Path) -> None:
    """What a pickler of today makes of equal strings and lists is not taken for an attack."""
    tokens = ["the", "man"]
    refs = [make_ref(i, i, i, "train", ["the man", "him"]) for i in range(2000)]
    for ref in refs:
        for sentence in ref["sentences"]:
            sentence |= {"raw": "the man", "sent": "the man", "tokens": tokens}
    (tmp_path / "x.p").write_bytes(pickle.dumps(refs, 4))
    assert load_refs(tmp_path / "x.p") == refs


def test_too_large_a_pickle(tmp_path: Path) -> None:
    with open(tmp_path / "refs(x).p", "wb") as f:
        f.truncate(300 << 20)
    assert "300 MB" in refusal(lambda: load_refs(tmp_path / "refs(x).p"), tmp_path)


# instances.json


def refused_instances(content: Any, folder: Path) -> str:
    root = write_root(folder, instances=content)
    message = refusal(lambda: REFER(root), folder)
    assert "instances.json" in message
    return message


def test_json_of_brackets(tmp_path: Path) -> None:
    assert "brackets" in refused_instances("[" + "[]," * (4 << 20) + "[]]", tmp_path)
    assert "brackets" in refused_instances("[" + "{}," * (4 << 20) + "{}]", tmp_path)
    refused_instances("[" * 50 + "]" * 49, tmp_path)


def test_too_large_a_json(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    with open(root / "refcoco" / "instances.json", "wb") as f:
        f.truncate(2 << 30)
    assert "2048 MB" in refusal(lambda: REFER(root), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 10**9),
        ("height", -12),
        ("width", math.nan),
        ("width", True),
        ("id", 1e3),
        ("id", [1]),
        ("file_name", None),
        ("file_name", {"a": 1}),
    ],
)
def test_image_records(tmp_path: Path, field: str, value: Any) -> None:
    content = default_instances()
    content["images"][0][field] = value
    refused_instances(content, tmp_path)


def test_repeated_ids(tmp_path: Path) -> None:
    content = default_instances()
    content["images"].append(content["images"][0] | {"width": 17})
    assert "two different images have the id 101" in refused_instances(content, tmp_path)


def pack(*runs: int) -> str:
    """COCO's compression of small numbers."""
    return "".join(chr(48 + n) for n in runs)


HUGE = 1 << 40
SEGMENTATIONS: dict[str, Any] = {
    "nan": [[math.nan] * 6],
    "infinite": [[0, 0, math.inf, 0, 5, 5]],
    "huge": [[0, 0, 1e300, 0, 5, 5]],
    "integers without end": [[0, 0, 10**4000, 0, 5, 5]],
    "many components": [[1, 1, 2, 1, 2, 2]] * 20_000,
    "a long outline": [[0, 0, 1e6, 1e6] * 50_000],
    "runs over the end": {"size": [12, 16], "counts": [0, 193]},
    "runs of another size": {"size": [10**9, 10**9], "counts": [10**18]},
    "huge runs": {"size": [12, 16], "counts": [HUGE, -HUGE + 192]},
    "packed runs over the end": {"size": [12, 16], "counts": pack(5, 15, 15, 15)},
    "packed negative runs": {"size": [12, 16], "counts": pack(16, 16)},
    "packed huge runs": {"size": [12, 16], "counts": "o" * 13 + "1"},
    "a run without an end": {"size": [12, 16], "counts": "o" * 1_000_000},
    "no size": {"size": None, "counts": [192]},
    "words": [["a", "b", "c", "d", "e", "f"]],
    "lists in lists": [[[[1, 2]]]],
    "a dictionary": {"a": 1},
    "a number": 7,
}


@pytest.mark.parametrize("name", SEGMENTATIONS)
@pytest.mark.parametrize("side", [None, 10_000], ids=["small", "large"])
def test_segmentations(tmp_path: Path, name: str, side: int | None) -> None:
    content = default_instances()
    content["annotations"][0]["segmentation"] = SEGMENTATIONS[name]
    if side:
        content["images"][0] |= {"width": side, "height": side}
    elif name == "many components":
        pytest.skip("few pixels a component take little time")
    refer = REFER(write_root(tmp_path, instances=content))
    message = refusal(lambda: refer.getMask(refer.Refs[1]), tmp_path, megabytes=1500)
    assert "annotation 11 of reference 1" in message
    report = examine(Installation(tmp_path))  # and the data doctor finds it
    assert not report.sound


def test_many_components_are_painted() -> None:
    mask = draw_components([[1, 1, 4, 1, 4, 4, 1, 4]] * 2000, 12, 16, "it")
    assert mask.max() == 255


@pytest.mark.parametrize(
    "bbox", [[math.nan] * 4, [1, 1, math.inf, 1], [1, 1, -5, 2], [10**400] * 4]
)
def test_boxes(tmp_path: Path, bbox: Any) -> None:
    content = default_instances()
    content["annotations"][0]["bbox"] = bbox
    refer = REFER(write_root(tmp_path, instances=content))
    assert refer.getRefBox(1) == [2.0, 2.0, 6.0, 6.0]
    assert refer.showRef(refer.Refs[1], "box").width == 16


# Paths


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jpg",
        "a/../../secret.jpg",
        "/etc/passwd",
        "//etc/passwd",
        "..\\secret.jpg",
        "a\\..\\..\\secret.jpg",
        "\\\\server\\share.jpg",
        "C:\\x.jpg",
        "x\0.jpg",
        "\ud800.jpg",
        "",
    ],
)
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    content = default_instances()
    content["images"][0]["file_name"] = name
    refer = REFER(write_root(tmp_path, instances=content))
    message = refusal(lambda: refer.open_image(101), tmp_path)
    assert "leads out of the image folder" in message
    assert "image 101" in message


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_links_that_lead_out(tmp_path: Path, linked: str) -> None:
    content = default_instances()
    name = content["images"][0]["file_name"]
    content["images"][0]["file_name"] = name if linked == "file" else f"out/{name}"
    refer = REFER(write_root(tmp_path, instances=content))
    outside = tmp_path / "outside"
    outside.mkdir()
    (refer.IMAGE_DIR / name).rename(outside / name)
    if linked == "file":
        (refer.IMAGE_DIR / name).symlink_to(outside / name)
    else:
        (refer.IMAGE_DIR / "out").symlink_to(outside)
    message = refusal(lambda: refer.open_image(101), tmp_path)
    assert "is a link out of the image folder" in message
    assert "--image_root" in message


def test_links_of_ones_own(tmp_path: Path) -> None:
    """The folder itself may be a link, and links may stay inside."""
    refer = REFER(write_root(tmp_path))
    inside = refer.IMAGE_DIR
    real = inside.rename(tmp_path / "elsewhere")
    inside.symlink_to(real)
    first = real / refer.Imgs[101]["file_name"]
    first.rename(real / "other.jpg")
    first.symlink_to("other.jpg")
    assert REFER(tmp_path).open_image(101).size == (16, 12)


def test_a_pipe_for_a_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    assert "is not a file" in refusal(lambda: open_rgb(tmp_path / "x.jpg"), tmp_path)


# Pictures


def png(width: int, height: int, depth: int, colour: int, content: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def many_scans() -> bytes:
    """A JPEG whose last scan comes a thousand times: little to store, and much to decode."""
    out = io.BytesIO()
    Image.new("L", (64, 64), 3).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 1000 + b"\xff\xd9"


PICTURES = {
    "bomb": (png(60_000, 60_000, 8, 0), "megapixels"),
    "bomb of one row": (png(2_000_000_000, 1, 1, 0), "megapixels"),
    "gif bomb": (b"GIF89a\xff\xff\xff\xff\x00\x00\x00;", ""),
    "ppm bomb": (b"P6 99999 99999 255\n", "megapixels"),
    "ppm of a huge number": (b"P6 " + b"9" * 5000 + b" 1 255\n", ""),
    "bmp bomb": (
        b"BM"
        + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
        "",
    ),
    "scans": (many_scans(), "scans"),
    "truncated": (png(64, 64, 8, 2, zlib.compress(b"\0" * 99)), "cannot be read"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not an image"),
    "pdf": (b"%PDF-1.4\n", "not an image"),
    "ico": (b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0\0\0\0\0\x16\0\0\0", "not an image"),
    "pickle": (pickle.dumps(PAYLOADS["os.system"]), "not an image"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(tmp_path: Path, name: str) -> None:
    data, words = PICTURES[name]
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    message = refusal(lambda: open_rgb(path), tmp_path)
    assert str(path) in message
    assert words in message


def test_too_large_a_picture(tmp_path: Path) -> None:
    with open(tmp_path / "x.jpg", "wb") as f:
        f.truncate(2 << 30)
    assert "2048 MB" in refusal(lambda: open_rgb(tmp_path / "x.jpg"), tmp_path)


def test_polyglots_are_pictures(tmp_path: Path) -> None:
    """A picture with an archive or a program behind it is decoded, the rest is not looked at."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(out, "JPEG")
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("data.pkl", pickle.dumps(PAYLOADS["os.system"]))
    (tmp_path / "x.jpg").write_bytes(out.getvalue() + pickle.dumps(PAYLOADS["eval"]))
    assert open_rgb(tmp_path / "x.jpg").size == (8, 8)
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_orientation_is_not_applied(tmp_path: Path, orientation: int, ending: str) -> None:
    """Annotations are in the file's own pixels; demo_inference.py alone turns photos upright."""
    corner = np.zeros((16, 32, 3), np.uint8)
    corner[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{ending}"
    Image.fromarray(corner).save(path, exif=exif)
    read = np.asarray(open_rgb(path))
    assert read.shape == corner.shape
    assert np.abs(read.astype(int) - corner).mean() < 8
    upright = demo_inference.open_upright(path)
    assert upright.size == ((16, 32) if orientation > 4 else (32, 16))


def test_deep_pictures_take_little_memory(tmp_path: Path) -> None:
    """16 bits a pixel, packed a thousandfold: the picture itself has 80 MB."""

    def read() -> None:
        assert open_rgb(tmp_path / "x.png").size == (4000, 10_000)
        raise InputError("read")

    rows = zlib.compress((b"\0" + b"\1\2" * 4000) * 10_000)
    (tmp_path / "x.png").write_bytes(png(4000, 10_000, 16, 0, rows))
    assert refusal(read, tmp_path, megabytes=700) == "read"


# Checkpoints


def saved(content: Any, zipped: bool = True, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def refused_checkpoint(data: bytes, folder: Path, name: str = "x.pth") -> str:
    path = folder / name
    path.write_bytes(data)
    message = refusal(lambda: read_checkpoint(path), folder)
    assert str(path) in message
    return message


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_in_checkpoints(tmp_path: Path, name: str, zipped: bool) -> None:
    for protocol in range(6):
        content = {"model": {"w": torch.ones(2)}, "args": PAYLOADS[name]}
        message = refused_checkpoint(saved(content, zipped, protocol), tmp_path)
        assert "x.pth" in message
        if protocol == 2:
            assert "holds more than tensors and plain values" in message


def test_payloads_for_every_reader_of_weights(tmp_path: Path, build_nano: Build) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(saved({"model": PAYLOADS["os.system"]}))
    model = build_nano()
    assert "x.pth" in refusal(lambda: load_swin_weights(model, str(path)), tmp_path)
    shutil.copy(TINY_BERT / "config.json", tmp_path)
    path.rename(tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(lambda: load_bert(tmp_path), tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "pytorch_model.bin").read_bytes())
    (tmp_path / "pytorch_model.bin").unlink()
    assert "cannot load BERT's weights" in refusal(lambda: load_bert(tmp_path), tmp_path)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_bare_pickles_and_archives(tmp_path: Path) -> None:
    for protocol in range(6):
        refused_checkpoint(pickle.dumps(PAYLOADS["os.system"], protocol), tmp_path)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../../pickle"), None)
    refused_checkpoint(out.getvalue(), tmp_path)
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "script.pth"))
    assert "TorchScript" in refused_checkpoint((tmp_path / "script.pth").read_bytes(), tmp_path)


def with_pickle(pickled: bytes, **parts: bytes) -> bytes:
    """A zip as torch.save writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, part in {"version": b"3\n", **parts}.items():
            archive.writestr(f"x/{name.replace('__', '/')}", part)
    return out.getvalue()


def tensor(items: int, shape: str, strides: str, offset: int = 0, key: str = "0") -> bytes:
    """Opcodes of a float tensor, its numbers in the text protocol."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + b"X\x01\x00\x00\x00"
        + key.encode()
        + b"X\x03\x00\x00\x00cpu"
        + _long(items)
        + b"tQ"
        + _long(offset)
        + _tuple(shape)
        + _tuple(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def _long(number: int) -> bytes:
    data = pickle.encode_long(number)
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(numbers: str) -> bytes:
    return b"(" + b"".join(_long(int(n)) for n in numbers.split()) + b"t"


def state(value: bytes) -> bytes:
    return b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00w" + value + b"ss."


LIES = {
    "more items than bytes": tensor(1000, "2", "1"),
    "items without end": tensor(1 << 60, "2", "1"),
    "negative items": tensor(-5, "2", "1"),
    "larger than its storage": tensor(4, "1000000000", "1"),
    "overflowing": tensor(4, f"{1 << 40} {1 << 40}", "1 1"),
    "behind its storage": tensor(4, "2", "1", offset=3),
    "before its storage": tensor(4, "2", "1", offset=-1),
    "long strides": tensor(4, "2", "1000000"),
    "negative strides": tensor(4, "2", "-1", offset=2),
    "one value, a billion times": tensor(4, "100000 100000", "0 0"),
    "negative shape": tensor(4, "-2", "1"),
    "shape without strides": tensor(4, "2 2", "1"),
    "no such storage": tensor(4, "2", "1", key="7"),
}


@pytest.mark.parametrize("name", LIES)
def test_weights_that_lie(tmp_path: Path, name: str) -> None:
    data = with_pickle(state(LIES[name]), data__0=bytes(16))
    assert "is damaged or no PyTorch checkpoint" in refused_checkpoint(data, tmp_path)


def test_weights_that_do_not(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(
        with_pickle(state(tensor(4, "2 1", "2 9", offset=1)), data__0=bytes(16))
    )
    assert read_checkpoint(tmp_path / "x.pth")["model"]["w"].tolist() == [[0.0], [0.0]]


PLAIN = {
    "lists, again and again": b"\x80\x02}K\x01]q\x00"
    + b"".join(
        b"](" + b"h" + bytes([i]) * 1 + (b"h" + bytes([i])) * 20 + b"eq" + bytes([i + 1])
        for i in range(30)
    )
    + b"s.",
    "itself": b"\x80\x02}q\x00K\x01h\x00s.",
    "deep": b"\x80\x02}K\x01" + b"]" * 100_000 + b"a" * 99_999 + b"s.",
    "tuples as a key": b"\x80\x02}K\x01K\x01\x86" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
    "tuples as a key of an OrderedDict": b"\x80\x02ccollections\nOrderedDict\n]](K\x01K\x01\x86"
    + b"q\x00h\x00\x86" * 60
    + b"K\x01ea\x85R.",
    "numbers that collide": b"\x80\x02}("
    + b"".join(_long((2**61 - 1) * (n + 2**40)) + b"K\x01" for n in range(2000))
    + b"u.",
    "long number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "nan as a name": b"\x80\x02}G\x7f\xf8\x00\x00\x00\x00\x00\x00K\x01s.",
    "extension": b"\x80\x02\x82\xf0.",
    "codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
    "import by name": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "instance": b"(S'touch pwned'\nios\nsystem\n.",
    "empty": b"",
}


@pytest.mark.parametrize("name", PLAIN)
def test_values_without_end(tmp_path: Path, name: str) -> None:
    refused_checkpoint(with_pickle(PLAIN[name]), tmp_path)


def test_numbers_may_be_long(tmp_path: Path) -> None:
    """As states of random generators are."""
    (tmp_path / "x.pth").write_bytes(saved({"inc": 1 << 127, "epoch": 3}))
    assert read_checkpoint(tmp_path / "x.pth") == {"inc": 1 << 127, "epoch": 3}


def zip_of(*members: tuple[str, bytes], packed: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as a:
        for name, part in members:
            a.writestr(name, part)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips(tmp_path: Path) -> None:
    good, evil = pickle.dumps({"a": 1}, 2), pickle.dumps(PAYLOADS["os.system"], 2)
    bomb = zip_of(("x/data.pkl", good), ("x/data/0", bytes(200 << 20)), packed=True)
    assert len(bomb) < 1 << 20
    assert "unpacks to more than its size" in refused_checkpoint(bomb, tmp_path)
    for other in ("x/DATA.PKL", "x/data.pkl"):
        twice = zip_of(("x/data.pkl", good), (other, evil))
        assert "two tables of contents" in refused_checkpoint(twice, tmp_path)
    inner = zip_of(("x/data.pkl", good))
    refused_checkpoint(inner + inner, tmp_path)  # the second one's places are of the first
    refused_checkpoint(zip_of(("y/data.pkl", evil)) + inner, tmp_path)
    refused_checkpoint(inner + b"trailing", tmp_path)
    refused_checkpoint(zip_of(("../data.pkl", evil)), tmp_path)
    refused_checkpoint(zip_of(("nothing", b"")), tmp_path)
    many = zip_of(("x/data.pkl", b"\x80\x02(" + b"}" * (20 << 20) + b"l."))
    assert "far too many values" in refused_checkpoint(many, tmp_path)


def test_a_false_checksum(tmp_path: Path) -> None:
    data = bytearray(saved({"model": {"w": torch.ones(1000)}}))
    data[data.index(b"\x00\x00\x80\x3f" * 9) + 3] = 0x40
    assert "checksum" in refused_checkpoint(bytes(data), tmp_path)


def safetensors(header: Any, content: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


def entry(kind: str = "F32", shape: Any = (1,), begin: int = 0, end: int = 4) -> dict[str, Any]:
    return {"w": {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}}


HEADERS = {
    "longer than the file": safetensors({}, size=1 << 40),
    "without end": safetensors({}, size=(1 << 64) - 1),
    "deep": safetensors(b'{"a":' * 100_000),
    "not text": safetensors(b"\xff" * 50),
    "no object": safetensors([1]),
    "behind the file": safetensors(entry(end=1 << 40, shape=[1 << 38]), bytes(4)),
    "of another size": safetensors(entry(shape=[1000]), bytes(4)),
    "overflowing": safetensors(entry(shape=[1 << 62, 1 << 62]), bytes(4)),
    "backwards": safetensors(entry(begin=4, end=0), bytes(4)),
    "of no type": safetensors(entry("X99"), bytes(4)),
    "negative": safetensors(entry(shape=[-1]), bytes(4)),
    "a hole": safetensors(entry(begin=4, end=8), bytes(8)),
    "a pickle": pickle.dumps(PAYLOADS["os.system"]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors(tmp_path: Path, name: str) -> None:
    message = refused_checkpoint(HEADERS[name], tmp_path, "x.safetensors")
    assert "safetensors" in message


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_weights_of_another_type(tmp_path: Path, build_nano: Build, kind: torch.dtype) -> None:
    model = build_nano("lavt_one")
    content = {"model": model.state_dict()}
    name = "backbone.patch_embed.proj.weight"
    content["model"][name] = content["model"][name].to(kind)
    path = tmp_path / "x.pth"
    if kind == torch.complex64:
        path.write_bytes(saved(content))
        assert "ComplexFloatStorage" in refusal(lambda: read_checkpoint(path), tmp_path)
    message = refusal(lambda: load_model(model, content, path), tmp_path)
    assert name in message
    assert str(kind) in message


def test_names_that_are_none(tmp_path: Path) -> None:
    for key in (math.nan, 1, None):
        with pytest.raises(InputError, match="no model weights"):
            flat_state({"model": {key: torch.ones(1)}}, "x.pth")
    odd = {"backbone.layers.99999999999.blocks.0": torch.ones(1), "\x1b[2J": torch.ones(1)}
    assert describe(odd)["swin_type"] is None


RESUMED: dict[str, Any] = {
    "epoch": "three",
    "best_oIoU": "high",
    "optimizer": [],
    "lr_scheduler": {"last_epoch": "x", "base_lrs": 3, "lr_lambdas": 7},
}


@pytest.mark.parametrize("key", RESUMED)
def test_training_state_of_the_wrong_kind(key: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weight])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    weight.sum().backward()
    optimizer.step()
    content = {
        "epoch": 1,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
    }
    load_training(content, "x.pth", optimizer, schedule)
    with pytest.raises(InputError, match=r"training state in x\.pth does not fit"):
        load_training(content | {key: RESUMED[key]}, "x.pth", optimizer, schedule)


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", "1"), ("lr", torch.ones(3)), ("betas", 3), ("betas", ["a", "b"]), ("eps", None)],
)
def test_optimizer_of_the_wrong_kind(key: str, value: Any) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 3))])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    held = optimizer.state_dict()
    held["param_groups"][0][key] = value
    content = {"epoch": 1, "optimizer": held, "lr_scheduler": schedule.state_dict()}
    with pytest.raises(InputError, match="does not fit"):
        load_training(content, "x.pth", optimizer, schedule)


def test_moments_of_another_shape() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weight])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    held = optimizer.state_dict()
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(9), "exp_avg_sq": torch.ones(2, 3)}
    content = {"epoch": 1, "lr_scheduler": schedule.state_dict()}
    content["optimizer"] = held | {"state": OrderedDict({0: moments})}
    with pytest.raises(InputError, match="exp_avg of its optimizer is of another shape"):
        load_training(content, "x.pth", optimizer, schedule)


# BERT's folder


def bert_folder(folder: Path, **config: Any) -> Path:
    for file in TINY_BERT.iterdir():
        shutil.copy(file, folder)
    content = json.loads((TINY_BERT / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 10**12),
        ("hidden_size", "a"),
        ("hidden_size", -16),
        ("hidden_size", 17),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 2.5),
        ("max_position_embeddings", 10**15),
        ("hidden_dropout_prob", math.nan),
        ("layer_norm_eps", [1]),
        ("hidden_act", "os.system"),
        ("hidden_act", {"a": 1}),
        ("model_type", "gpt2"),
        ("model_type", ["bert"]),
        ("position_embedding_type", "relative_key"),
    ],
)
def test_configurations(tmp_path: Path, key: str, value: Any) -> None:
    bert_folder(tmp_path, **{key: value})
    message = refusal(lambda: load_config(tmp_path), tmp_path)
    assert "config.json" in message
    assert str(tmp_path) in message


def test_configurations_name_no_code(tmp_path: Path) -> None:
    """What may name code, files or sizes is not taken over."""
    (tmp_path / "evil.py").write_text(f"open({MARKER!r}, 'w')\nclass Evil: pass\n")
    config = load_config(
        bert_folder(
            tmp_path,
            auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"},
            trust_remote_code=True,
            num_labels=10**12,
            attn_implementation="someone/kernel",
            quantization_config={"quant_method": "gptq"},
            transformers_weights="../other.safetensors",
            to_dict="x",
        )
    )
    assert (config.hidden_size, config.num_hidden_layers, config.num_labels) == (16, 2, 2)
    assert not hasattr(config, "auto_map")
    assert not hasattr(config, "quantization_config")
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\0"])
def test_configurations_that_are_none(tmp_path: Path, text: str) -> None:
    (bert_folder(tmp_path) / "config.json").write_text(text)
    assert str(tmp_path) in refusal(lambda: load_config(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "tokenizer_config.json"])
def test_too_large_files_of_bert(tmp_path: Path, name: str) -> None:
    with open(bert_folder(tmp_path) / name, "wb") as f:
        f.truncate(1 << 30)
    assert name in refusal(lambda: load_tokenizer(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.txt", b"\xff\xfe" * 1000),
        ("vocab.txt", b"\n" * 1000),
        ("vocab.txt", b"a" * 1_000_000),
        ("vocab.txt", pickle.dumps(PAYLOADS["os.system"])),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", b'{"model": {"type": "Evil"}}'),
    ],
)
def test_vocabularies(tmp_path: Path, name: str, content: bytes) -> None:
    (bert_folder(tmp_path) / name).write_bytes(content)
    assert "tokenizer" in refusal(lambda: load_tokenizer(tmp_path), tmp_path)


# The list of demo_inference.py


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '[{"image": "a\\u0000b", "sentence": "x"}]',
        '[{"image": "\\ud800.jpg", "sentence": "x"}]',
        '[{"image": 1e999, "sentence": "x"}]',
        '[{"image": "a.jpg", "sentence": {"a": 1}}]',
        '[{"image": "a.jpg", "sentence": [NaN]}]',
        '[{"image": ' + "9" * 5000 + ', "sentence": "x"}]',
        '{"__class__": "os.system"}',
    ],
)
def test_lists(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.json").write_text(text)
    argv = ["--list", "list.json", "--resume", "x.pth", "--output", "out"]
    assert "list.json" in refusal(lambda: demo_inference.main(argv), tmp_path)
    assert not (tmp_path / "out").exists()


def test_too_large_a_list(tmp_path: Path) -> None:
    with open(tmp_path / "list.json", "wb") as f:
        f.truncate(100 << 20)
    argv = ["--list", "list.json", "--resume", "x.pth", "--output", "out"]
    assert "64 MB" in refusal(lambda: demo_inference.main(argv), tmp_path)


# What is told of them


def test_messages_cannot_control_a_terminal() -> None:
    assert str(InputError("a\x1b[2Jb\x07\u202ec")) == "a\\x1b[2Jb\\x07\\u202ec"
    assert str(InputError("Größe 图片 \U0001f600")) == "Größe 图片 \U0001f600"
    long = str(InputError("begin " + "x" * 100_000 + " end"))
    assert long.startswith("begin")
    assert long.endswith("end")
    assert len(long) <= LONGEST + 3
