"""The commands of docs/your_data.md, on generated scenes and with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import demo_inference
import test as test_script
import train as train_script
from refer import check
from refer.convert import __main__ as convert
from refer.convert.sources import read_jsonl
from tests.own_data import OwnData
from tests.scripts import REPO, TIMEOUT, TINY, Shapes, environment
from tools.report import __main__ as report

PAGE = (REPO / "docs/your_data.md").read_text(encoding="utf-8")
MAINS = {
    "refer.convert": convert.main,
    "refer.check": check.main,
    "train.py": train_script.main,
    "test.py": test_script.main,
    "tools.report": report.main,
    "demo_inference.py": demo_inference.main,
}
Run = Callable[[list[str]], str]
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


@pytest.fixture
def run(
    folder: Path,
    shapes: Shapes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs a command in this process, which is faster, with a tiny model in place of the page's."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(REPO))  # tools.report starts test.py
    bert = str(shapes.root / "bert")
    tiny = [*TINY, "--ck_bert", bert, "--bert_tokenizer", bert, "--device", "cpu", "--epochs", "1"]
    tiny += ["--text_from_scratch", "--lang_layers", "all", "--pretrained_swin_weights", ""]
    more = {"train.py": [*tiny, "--batch-size", "8"], "test.py": ["--workers", "0"]}

    def run(words: list[str]) -> str:
        script, *rest = words[2:] if words[1] == "-m" else words[1:]
        MAINS[script]([*rest, *more.get(script, [])])
        return capsys.readouterr().out

    return run


def test_from_photos_to_a_trained_model(folder: Path, run: Run) -> None:
    road, kinds = commands()[:6], commands()[6:]
    assert all(words[2] == "refer.convert" for words in kinds)
    for words in road[:2]:
        assert "mydata(unc) is sound" in run(words)
    scripts = ["train.py", "test.py", "-m", "demo_inference.py"]
    assert [words[1] for words in road[2:]] == scripts
    outputs = [run(words) for words in road[2:]]
    assert "oIoU" in outputs[1]
    assert (folder / "report.html").stat().st_size > 10_000
    assert len(list((folder / "demo").iterdir())) == 2
    arguments = json.loads((folder / "models/mydata/args.json").read_text())
    assert arguments["dataset"] == "mydata"


@pytest.mark.parametrize("words", commands()[6:], ids=lambda words: Path(words[-1]).name)
def test_kinds_of_input(run: Run, words: list[str]) -> None:
    if "parquet" in words:
        pytest.importorskip("pyarrow")
    name = Path(words[words.index("--out") + 1]).name
    assert f"{name}(unc) is sound" in run(words)


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
