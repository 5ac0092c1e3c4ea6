"""The commands of docs/your_data.md, on generated scenes and with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refer import check
from refer.convert import __main__ as convert
from refer.convert.sources import read_jsonl
from tests.own_data import OwnData
from tests.scripts import REPO, TIMEOUT, TINY, Shapes, environment

PAGE = (REPO / "docs/your_data.md").read_text(encoding="utf-8")
COCO_IMAGES = "refer/data/images/mscoco/images/train2014"


def commands() -> list[list[str]]:
    """The words of each command of the page."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    text = "".join(block for language, block in blocks if not language)
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines]
    assert all(first == "python" for first, *_ in words)
    return words


@pytest.fixture(scope="module")
def folder(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the page says the reader has."""
    folder = tmp_path_factory.mktemp("page")
    own = OwnData(shapes.root, folder)
    own.write_jsonl()
    own.write_coco()
    own.write_labelme()
    own.write_masks()
    if importlib.util.find_spec("pyarrow"):
        own.write_parquet()
    shutil.copytree(own.refer.IMAGE_DIR, folder / COCO_IMAGES)
    shutil.copy(next(own.photos.glob("*.jpg")), folder / "new.jpg")
    return folder


def run_here(
    folder: Path,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """The output of refer.convert or refer.check, run in this process, which is faster."""
    monkeypatch.chdir(folder)
    {"refer.convert": convert.main, "refer.check": check.main}[words[2]](words[3:])
    return capsys.readouterr().out


def run(folder: Path, words: list[str], shapes: Shapes) -> str:
    """The output of a command, with a tiny model in place of the page's."""
    script = words[1:]
    if script[0] == "train.py":
        bert = str(shapes.root / "bert")
        script += [*TINY, "--ck_bert", bert, "--bert_tokenizer", bert, "--device", "cpu"]
        script += ["--text_from_scratch", "--lang_layers", "all", "--pretrained_swin_weights", ""]
        script += ["--epochs", "1", "--batch-size", "8"]
    elif script[0] == "test.py":
        script += ["--workers", "0"]
    script[0] = str(REPO / script[0]) if script[0].endswith(".py") else script[0]
    done = subprocess.run(
        [sys.executable, *script],
        cwd=folder,
        env=environment() | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def test_from_photos_to_a_trained_model(
    folder: Path,
    shapes: Shapes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    road, kinds = commands()[:6], commands()[6:]
    assert all(words[2] == "refer.convert" for words in kinds)
    for words in road[:2]:
        assert "mydata(unc) is sound" in run_here(folder, words, monkeypatch, capsys)
    scripts = ["train.py", "test.py", "-m", "demo_inference.py"]
    assert [words[1] for words in road[2:]] == scripts
    outputs = [run(folder, words, shapes) for words in road[2:]]
    assert "oIoU" in outputs[1]
    assert (folder / "report.html").stat().st_size > 10_000
    assert len(list((folder / "demo").iterdir())) == 2
    arguments = json.loads((folder / "models/mydata/args.json").read_text())
    assert arguments["dataset"] == "mydata"


@pytest.mark.parametrize("words", commands()[6:], ids=lambda words: Path(words[-1]).name)
def test_kinds_of_input(
    folder: Path,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "parquet" in words:
        pytest.importorskip("pyarrow")
    name = Path(words[words.index("--out") + 1]).name
    assert f"{name}(unc) is sound" in run_here(folder, words, monkeypatch, capsys)


def test_the_example_lines(tmp_path: Path) -> None:
    example = re.search(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert example
    path = tmp_path / "expressions.jsonl"
    path.write_text(example[1], encoding="utf-8")
    assert [len(item.objects) for item in read_jsonl(path)] == [1, 1, 0]


def test_an_error_is_one_line(folder: Path, tmp_path: Path) -> None:
    path = folder / "photos" / "wrong.jsonl"
    path.write_text('{"image": "1.jpg"}\n{"image"\n')
    done = subprocess.run(
        [sys.executable, "-m", "refer.convert", "--input", str(path), "--out", "data/wrong"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "wrong.jsonl, line 1" in done.stderr
    assert not (tmp_path / "data" / "wrong").exists()
