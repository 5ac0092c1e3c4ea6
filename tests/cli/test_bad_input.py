"""What a user can get wrong ends in one line that names the thing, and overwrites nothing."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import test as test_script
import train as train_script
from tests.scripts import Shapes, one_line_error, run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copied(shapes: Shapes, here: Path) -> Shapes:
    """A copy of the data that a test may damage."""
    shutil.copytree(shapes.root, here / "data")
    return Shapes(here / "data")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset", "refcococo"], ["refcococo", "refcoco+"]),
        (["--splitBy", "umd"], ["umd", "unc"]),
        (["--dataset", "refclef"], ["refclef"]),
        (["--val_split", "testC"], ["testC", "testA"]),
        (["--refer_data_root", "nowhere"], ["nowhere"]),
        (["--image_root", "nowhere"], ["nowhere"]),
        (["--batch-size", "1000"], ["1000", "--batch_size"]),
        (["--batch-size", "0"], ["--batch_size 0"]),
        (["--lr", "-1"], ["--lr -1"]),
        (["--epochs", "two"], ["--epochs"]),
        (["--mha", "1-2"], ["--mha 1-2"]),
        (["--mha", "1-1-1-7"], ["--mha 1-1-1-7", "256"]),
        (["--model", "crossvlt", "--mha", "1-1-1-1"], ["--mha 1-1-1-1", "crossvlt"]),
        (["--model_id", "../x"], ["--model_id"]),
        (["--swin_type", "huge"], ["huge", "tiny"]),
        (["--device", "gpu"], ["--device gpu"]),
        (["--ck_bert", "nowhere/bert"], ["nowhere/bert", "config.json"]),
        (["--bert_tokenizer", "nowhere/bert"], ["nowhere/bert", "vocab.txt"]),
        (["--resume", "nothing.pth"], ["nothing.pth"]),
        (["--pretrained_swin_weights", "nothing.pth"], ["nothing.pth"]),
        (["--fusion_drop", "1.5"], ["--fusion_drop 1.5"]),
    ],
)
def test_train_options(shapes: Shapes, here: Path, options: list[str], words: list[str]) -> None:
    line = one_line_error(train_script.main, [*shapes.train_options, *options])
    assert all(word in line for word in words), line
    assert not list(here.rglob("*.pth"))


def test_evaluation_needs_a_checkpoint(shapes: Shapes, here: Path) -> None:
    line = one_line_error(test_script.main, [*shapes.options, "--split", "val"])
    assert "--resume" in line


def test_bert_without_weights_names_the_files(shapes: Shapes, here: Path) -> None:
    options = [o for o in shapes.train_options if o != "--text_from_scratch"]
    line = one_line_error(train_script.main, options)
    assert "model.safetensors" in line


def _truncate(root: Path) -> str:
    path = next(root.rglob("COCO_train2014_*.jpg"))
    path.write_bytes(path.read_bytes()[:400])
    return path.name


def _text_as_image(root: Path) -> str:
    path = next(root.rglob("COCO_train2014_*.jpg"))
    path.write_text("not a picture")
    return path.name


def _no_images(root: Path) -> str:
    shutil.rmtree(root / "images")
    return "images"


def _no_pickle(root: Path) -> str:
    (root / "refcoco" / "refs(unc).p").unlink()
    return "refs(unc).p"


def _no_instances(root: Path) -> str:
    (root / "refcoco" / "instances.json").unlink()
    return "instances.json"


def _bad_json(root: Path) -> str:
    (root / "refcoco" / "instances.json").write_text('{"images": [')
    return "instances.json"


def _no_polygons(root: Path) -> str:
    path = root / "refcoco" / "instances.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    path.write_text(json.dumps(content))
    return "annotation"


class Payload:
    """Unpickled by a careless reader, it would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch pwned",)


def _hostile_pickle(root: Path) -> str:
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([Payload()], protocol=2))
    return "refs(unc).p"


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _text_as_image,
        _no_images,
        _no_pickle,
        _no_instances,
        _bad_json,
        _no_polygons,
        _hostile_pickle,
    ],
)
def test_damaged_data(copied: Shapes, here: Path, damage: Callable[[Path], str]) -> None:
    named = damage(copied.root)
    line = one_line_error(
        train_script.main, [*copied.train_options, "--epochs", "1", "--batch-size", "8"]
    )
    assert named in line
    assert not (here / "pwned").exists()
    # An image of the validation is read after an epoch, whose state is kept.
    of_image = damage in (_truncate, _text_as_image)
    assert of_image or not list(here.rglob("*.pth"))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "1", "RGBA", "1x1"])
def test_images_of_every_kind_work(copied: Shapes, here: Path, mode: str) -> None:
    """Grayscale, palette, CMYK, 16-bit and one-pixel images are ordinary images."""
    for path in copied.root.rglob("COCO_train2014_*.jpg"):
        with Image.open(path) as image_file:
            image_file.load()
        if mode == "1x1":
            image_file = image_file.resize((1, 1)).resize((1, 1))
        elif mode == "I;16":
            image_file = (
                image_file.convert("L").convert("I").point(lambda v: v * 256).convert("I;16")
            )
        else:
            image_file = image_file.convert(mode)
        image_file.save(path, "JPEG" if mode in ("L", "CMYK") else "PNG")
    train_script.main([*copied.train_options, "--epochs", "1", "--batch-size", "8"])
    assert Path("checkpoints/model_best_lavt.pth").is_file()


def test_empty_expressions_work(copied: Shapes, here: Path) -> None:
    path = copied.root / "refcoco" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes(), encoding="latin1")
    for i, ref in enumerate(refs):
        for sentence in ref["sentences"]:
            sentence["raw"] = "" if i % 2 else " ?! "
    path.write_bytes(pickle.dumps(refs, protocol=2))
    train_script.main([*copied.train_options, "--epochs", "1"])
    assert Path("checkpoints/model_best_lavt.pth").is_file()


@pytest.fixture(scope="module")
def checkpoint(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the small model."""
    cwd = tmp_path_factory.mktemp("checkpoint")
    done = run(cwd, "train.py", *shapes.train_options, "--epochs", "1", "--model_id", "small")
    assert done.returncode == 0, done.stderr
    return cwd / "checkpoints" / "model_last_small.pth"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--swin_type", "tiny"], ["--swin_type micro"]),
        (["--model", "crossvlt"], ["--model lavt"]),
        (["--window12"], ["window 7"]),
        (["--ape", "0"], ["--ape 14"]),
        (["--split", "testC"], ["testC"]),
        (["--split", "val,val"], ["val,val"]),
        (["--dataset", "refcocog"], ["unc", "umd"]),
    ],
)
def test_checkpoint_of_another_model(
    shapes: Shapes, here: Path, checkpoint: Path, options: list[str], words: list[str]
) -> None:
    argv = [*shapes.options, "--split", "val", "--resume", str(checkpoint), *options]
    line = one_line_error(test_script.main, argv)
    assert all(word in line for word in words), line
    assert not list(here.rglob("*.json"))


def test_damaged_and_hostile_checkpoints(shapes: Shapes, here: Path, checkpoint: Path) -> None:
    argv = [*shapes.options, "--split", "val", "--resume"]
    (here / "short.pth").write_bytes(checkpoint.read_bytes()[:5000])
    assert "short.pth" in one_line_error(test_script.main, [*argv, "short.pth"])
    torch.save({"model": Payload()}, here / "hostile.pth")
    assert "hostile.pth" in one_line_error(test_script.main, [*argv, "hostile.pth"])
    assert not (here / "pwned").exists()
    torch.save({"a": 1}, here / "empty.pth")
    assert "no model weights" in one_line_error(test_script.main, [*argv, "empty.pth"])


def test_exit_code_and_no_traceback(shapes: Shapes, here: Path) -> None:
    done = run(here, "train.py", *shapes.train_options, "--dataset", "refcocog")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr + done.stdout


def test_unwritable_output(shapes: Shapes, here: Path) -> None:
    (here / "taken").write_text("a file, not a folder")
    line = one_line_error(
        train_script.main, [*shapes.train_options, "--epochs", "1", "--output-dir", "taken"]
    )
    assert "taken" in line
    assert (here / "taken").read_text() == "a file, not a folder"
