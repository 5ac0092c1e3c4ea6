"""Untrusted files: no code of a file runs, and a damaged one gives one line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import demo_inference
from bert import load_bert, load_config, load_tokenizer
from lib.checkpoint import load_training, read_checkpoint
from lib.checkpoint.swin import load_swin_weights
from lib.errors import LONGEST, InputError
from lib.predictor import open_upright
from refer import REFER
from refer.check import CheckedREFER, examine
from refer.images import open_rgb
from refer.masks import draw_components
from refer.pickles import load_refs
from tests.conftest import Build
from tests.refer_files import TINY_BERT, default_instances, default_refs, write_root

MARKER = "pwned"  # a file that a payload would make


class Payload:
    """Pickled, it is a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """Never called; pickle requires that the first element of a call is callable."""


TOUCH = f"touch {MARKER}"
OPEN = f"open('{MARKER}', 'w')"
PAYLOADS = {
    "os.system": Payload(os.system, TOUCH),
    "eval": Payload(eval, OPEN),
    "exec": Payload(exec, OPEN),
    "open": Payload(open, MARKER, "w"),
    "chain": Payload(Payload(getattr, Payload(__import__, "os"), "system"), TOUCH),
    "nested": Payload(list, Payload(map, eval, [OPEN])),
    "partial": Payload(__import__("functools").partial(os.system, TOUCH)),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Payloads would leave their mark in the working directory."""
    monkeypatch.chdir(tmp_path)


def error_of(read: Callable[[], Any]) -> str:
    """The one-line message of a reader, which ran nothing."""
    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert message.isprintable()
    assert not Path(MARKER).exists()
    return message


def test_the_payloads_work() -> None:
    for name, payload in PAYLOADS.items():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            pickle.loads(pickle.dumps(payload, protocol))
            assert Path(MARKER).exists(), name
            Path(MARKER).unlink()


# Refs pickles


def refs_error(data: bytes) -> str:
    Path("refs(x).p").write_bytes(data)
    message = error_of(lambda: load_refs("refs(x).p"))
    assert message.startswith("refs(x).p: ")
    return message


@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_in_refs(name: str) -> None:
    refs: Any = default_refs()
    refs[0]["sentences"][0]["tokens"] = PAYLOADS[name]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert "not loaded, it asks for" in refs_error(pickle.dumps(refs, protocol))


def test_other_objects_in_refs() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for value in (np.datetime64(3, "s"), np.zeros((2, 2)), np.zeros(2, "i4,f8"), np.float64):
            assert "not loaded, it" in refs_error(pickle.dumps([value], protocol))
        hidden = np.array([PAYLOADS["os.system"]], dtype=object)
        assert "it asks for" in refs_error(pickle.dumps([hidden], protocol))
    assert "it calls a codec" in refs_error(b"c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0rot13\x86R.")
    assert "objects outside itself" in refs_error(b"\x80\x02U\x01aQ.")
    assert "it holds a tuple" in refs_error(pickle.dumps((1, 2)))
    assert "nested more than" in refs_error(pickle.dumps([[[[[[[[[[1]]]]]]]]]]))


def test_a_refs_file_cut_or_damaged_anywhere() -> None:
    whole = pickle.dumps(default_refs(), 2)
    for size in range(0, len(whole) - 1, 7):
        refs_error(whole[:size])
    for place in range(0, len(whole), 11):
        Path("refs(x).p").write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        with contextlib.suppress(InputError):  # and no other exception
            load_refs("refs(x).p")
    assert not Path(MARKER).exists()


def test_too_large_a_file() -> None:
    for name, read in (("refs(x).p", load_refs), ("x.jpg", open_rgb)):
        with open(name, "wb") as file:
            file.truncate(2 << 30)
        assert "2048 MB" in error_of(lambda read=read, name=name: read(name))  # type: ignore[misc]
    root = write_root(Path("data"))
    with open(root / "refcoco" / "instances.json", "wb") as file:
        file.truncate(2 << 30)
    assert "2048 MB" in error_of(lambda: REFER(root))


# Annotations


def instances_error(content: Any, folder: Path) -> str:
    message = error_of(lambda: REFER(write_root(folder, instances=content)))
    assert "instances.json" in message
    return message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 10**9),
        ("height", -12),
        ("width", math.nan),
        ("width", True),
        ("id", 1.5),
        ("id", 1e300),
        ("id", "1 2"),
        ("height", 0),
        ("id", [1]),
        ("file_name", None),
        ("file_name", {"a": 1}),
    ],
)
def test_image_records(tmp_path: Path, field: str, value: Any) -> None:
    content = default_instances()
    content["images"][0][field] = value
    instances_error(content, tmp_path)


def test_repeated_ids(tmp_path: Path) -> None:
    content = default_instances()
    content["images"].append(content["images"][0] | {"width": 17})
    assert "two different images have the id 101" in instances_error(content, tmp_path)


HUGE = 1 << 40
SEGMENTATIONS: dict[str, Any] = {
    "nan": [[math.nan] * 6],
    "infinite": [[0, 0, math.inf, 0, 5, 5]],
    "huge": [[0, 0, 1e300, 0, 5, 5]],
    "integers without end": [[0, 0, 10**4000, 0, 5, 5]],
    "a long outline": [[0, 0, 1e6, 1e6] * 50_000],
    "runs over the end": {"size": [12, 16], "counts": [0, 193]},
    "runs of another size": {"size": [10**9, 10**9], "counts": [10**18]},
    "huge runs": {"size": [12, 16], "counts": [HUGE, -HUGE + 192]},
    "packed runs over the end": {"size": [12, 16], "counts": "5???"},
    "packed negative runs": {"size": [12, 16], "counts": "@@"},
    "packed huge runs": {"size": [12, 16], "counts": "o" * 13 + "1"},
    "a run without an end": {"size": [12, 16], "counts": "o" * 1000},
    "no size": {"size": None, "counts": [192]},
    "words": [["a", "b", "c", "d", "e", "f"]],
    "lists in lists": [[[[1, 2]]]],
    "a dictionary": {"a": 1},
    "a number": 7,
}


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_segmentations(tmp_path: Path, name: str) -> None:
    content = default_instances()
    content["annotations"][0]["segmentation"] = SEGMENTATIONS[name]
    refer = REFER(write_root(tmp_path, instances=content))
    message = error_of(lambda: refer.getMask(refer.Refs[1]))
    assert "annotation 11 of reference 1" in message
    assert not examine(CheckedREFER(tmp_path)).sound


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
    message = error_of(lambda: refer.open_image(101))
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
    message = error_of(lambda: refer.open_image(101))
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


def test_a_pipe_for_an_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    assert "is not a file" in error_of(lambda: open_rgb(tmp_path / "x.jpg"))


# Images


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"P6 99999 99999 255\n", "--max_pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not an image"),
        (pickle.dumps(PAYLOADS["os.system"]), "not an image"),
    ],
)
def test_images(data: bytes, words: str) -> None:
    Path("x.jpg").write_bytes(data)
    assert words in error_of(lambda: open_rgb("x.jpg"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_orientation_is_not_applied(tmp_path: Path, orientation: int, ending: str) -> None:
    """Annotations are in the file's own pixels; demo_inference.py alone applies it."""
    corner = np.zeros((16, 32, 3), np.uint8)
    corner[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{ending}"
    Image.fromarray(corner).save(path, exif=exif)
    read = np.asarray(open_rgb(path))
    assert read.shape == corner.shape
    assert np.abs(read.astype(int) - corner).mean() < 8
    upright = open_upright(path)
    assert upright.size == ((16, 32) if orientation > 4 else (32, 16))


# Checkpoints


def saved(content: Any, zipped: bool = True, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def tar_of(pickled: bytes) -> bytes:
    """The format of PyTorch 0.1: a tar with storages, tensors and a pickle."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        numbers = pickle.dumps(0)
        for name, part in (("storages", numbers), ("tensors", numbers), ("pickle", pickled)):
            info = tarfile.TarInfo(name)
            info.size = len(part)
            tar.addfile(info, io.BytesIO(part))
    return out.getvalue()


def checkpoint_error(data: bytes, name: str = "x.pth") -> str:
    Path(name).write_bytes(data)
    message = error_of(lambda: read_checkpoint(name))
    assert name in message
    return message


@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_in_checkpoints(name: str) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        for zipped in (True, False):
            content = {"model": {"w": torch.ones(2)}, "args": {"a": [PAYLOADS[name]]}}
            message = checkpoint_error(saved(content, zipped, protocol))
            if protocol == 2:
                assert "holds more than tensors and plain values" in message
        checkpoint_error(pickle.dumps(PAYLOADS[name], protocol))
        checkpoint_error(tar_of(pickle.dumps(PAYLOADS[name], protocol)))


def test_the_object_that_is_not_loaded_is_named() -> None:
    message = checkpoint_error(saved({"model": {"w": torch.ones(1)}, "x": Path("y")}))
    assert "pathlib" in message
    assert "in c['x']" in message
    assert "save it again" in message
    assert (
        "os.system" in (text := checkpoint_error(saved(PAYLOADS["os.system"]))) or "posix" in text
    )


def test_payloads_for_every_reader_of_weights(build_nano: Build) -> None:
    Path("x.pth").write_bytes(saved({"model": PAYLOADS["os.system"]}))
    model = build_nano()
    assert "x.pth" in error_of(lambda: load_swin_weights(model, "x.pth"))
    folder = Path("bert")
    folder.mkdir()
    shutil.copy(TINY_BERT / "config.json", folder)
    for name in ("pytorch_model.bin", "model.safetensors"):
        shutil.copy("x.pth", folder / name)
        assert name in error_of(lambda: load_bert(folder))
        (folder / name).unlink()


def test_a_checkpoint_cut_or_damaged_anywhere() -> None:
    content = {"model": {"w": torch.arange(40.0)}, "args": {"lr": 0.1}, "epoch": 3}
    for zipped in (True, False):
        whole = saved(content, zipped)
        for size in range(0, len(whole) - 1, max(1, len(whole) // 60)):
            checkpoint_error(whole[:size])
        for place in range(0, len(whole), 17):
            broken = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
            Path("x.pth").write_bytes(broken)
            with contextlib.suppress(InputError):  # and no other exception
                read_checkpoint("x.pth")
    checkpoint_error(b"not tensors", "x.safetensors")
    assert not Path(MARKER).exists()


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
    message = error_of(lambda: load_config(tmp_path))
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
    assert str(tmp_path) in error_of(lambda: load_config(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "tokenizer_config.json"])
def test_too_large_files_of_bert(tmp_path: Path, name: str) -> None:
    with open(bert_folder(tmp_path) / name, "wb") as f:
        f.truncate(1 << 30)
    assert name in error_of(lambda: load_tokenizer(tmp_path))


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
    assert "tokenizer" in error_of(lambda: load_tokenizer(tmp_path))


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
    assert "list.json" in error_of(lambda: demo_inference.main(argv))
    assert not (tmp_path / "out").exists()


def test_too_large_a_list(tmp_path: Path) -> None:
    with open(tmp_path / "list.json", "wb") as f:
        f.truncate(100 << 20)
    argv = ["--list", "list.json", "--resume", "x.pth", "--output", "out"]
    assert "64 MB" in error_of(lambda: demo_inference.main(argv))


# Messages


def test_messages_cannot_control_a_terminal() -> None:
    assert str(InputError("a\x1b[2Jb\x07\u202ec")) == "a\\x1b[2Jb\\x07\\u202ec"
    assert str(InputError("Größe 图片 \U0001f600")) == "Größe 图片 \U0001f600"
    long = str(InputError("begin " + "x" * 100_000 + " end"))
    assert long.startswith("begin")
    assert long.endswith("end")
    assert len(long) <= LONGEST + 3
