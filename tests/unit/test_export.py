"""Exported models: torch.export and ONNX, their check, and the script in the docs."""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BertConfig

from bert import encode, load_tokenizer
from lib.checkpoint.rebuild import Trained
from lib.errors import InputError
from lib.predictor import Predictor
from lib.segmentation import build_model
from lib.swin import SWIN_SIZES, SwinSize
from lib.variants import Variant
from tests.refer_files import TINY_BERT
from tests.scripts import one_line_error
from tools.export import programs
from tools.export.__main__ import main, parse
from tools.export.check import IMAGES, compare, read_samples
from tools.export.programs import export_onnx, export_torch, trace

DOCS = Path(__file__).parents[2] / "docs" / "other_runtimes.md"
SIDE = 60  # not a multiple of the patches times the window: maps are padded
NO_TORCH = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
EXPRESSIONS = ("the dog on the left", "man's T-shirt, 2nd from right", "Café", "x" * 90, "")


def build(name: str = "lavt", width: int = 8, **options: object) -> Trained:
    """A model of one block a stage, two in the first; BatchNorm is not the identity."""
    torch.manual_seed(0)
    config = BertConfig(
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 32, "vocab_size": 117},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SWIN_SIZES, "shallow", SwinSize(width, (2, 1, 1, 1), (1, 2, 4, 8)))
        chosen = {"swin_type": "shallow", "window_size": 7, "accelerate": False} | options
        model = build_model(name, text_config=config, **chosen)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
    torch.nn.init.normal_(model.classifier.conv1_1.weight)  # type: ignore[union-attr, arg-type]
    settings = {"model": name, "img_size": SIDE, "max_tokens": 20}
    return Trained(model.eval(), load_tokenizer(TINY_BERT), settings, frozenset(), (), "")


def arguments(kind: str, output: Path, *more: str) -> argparse.Namespace:
    """Of the command line; the checkpoint is not read."""
    return parse(["--resume", "x", "--format", kind, "--output", str(output), *more])


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Without torch's trace log, which pytest would collect: it takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX folder: it takes the most time of all."""
    path = tmp_path_factory.mktemp("onnx")
    export_onnx(build(), arguments("onnx", path))
    return path


# Every export takes seconds, so that each has several of the models' features.
VARIANTS: dict[str, dict[str, object]] = {
    "lavt_one, window 12": {
        "name": "lavt_one",
        "window_size": 12,
        "ape_grid": 5,
        "mha": "1-2-4-8",
        "variant": Variant(pwam_norm="layer", pwam_attention="sigmoid"),
    },
    "crossvlt": {"name": "crossvlt", "width": 32, "ape_grid": 5},
    "batch norm": {"variant": Variant(pwam_norm="batch", decoder_features="V", gate="off")},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_torch_program_computes_the_same(options: dict[str, object], tmp_path: Path) -> None:
    output = tmp_path / "new" / "model.pt2"
    trained = build(**options)  # type: ignore[arg-type]
    export_torch(trained, arguments("torch", output))
    report = json.loads((tmp_path / "new" / "model.pt2.check.json").read_text())
    assert report["largest_difference"] < 1e-5
    assert {row["batch"] for row in report["rows"]} == {1, 3}
    assert all(row["largest"] > 1e-2 for row in report["rows"])
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "model.pt2",
        "model.pt2.check.json",
    ]
    # Tracing leaves no tensors without data in the model's caches.
    words = torch.ones(2, 1, 20, dtype=torch.long)
    with torch.no_grad():
        assert trained.model(torch.randn(1, 3, SIDE, SIDE), *words).isfinite().all()


def test_a_wrong_weight_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = build()
    output = tmp_path / "model.pt2"
    output.write_text("earlier")

    def wrong(model: torch.nn.Module, *sizes: int) -> torch.export.ExportedProgram:
        program = trace(model, *sizes)  # type: ignore[arg-type]
        name = "classifier.conv1_1.weight"
        program.state_dict[name] = torch.nn.Parameter(program.state_dict[name] * 1.2)
        return program

    monkeypatch.setattr(programs, "trace", wrong)
    with pytest.raises(InputError, match=r"logits by .* no file was written"):
        export_torch(trained, arguments("torch", output))
    assert "COCO_train2014_000000900001.jpg" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert output.read_text() == "earlier"


@pytest.mark.parametrize("wrong", ["nan", "shape", "masks"])
def test_the_check_finds(wrong: str) -> None:
    trained = build()
    samples = read_samples(trained, IMAGES)

    def run(*inputs: Tensor) -> Tensor:
        logits = trained.model(*inputs)
        if wrong == "shape":
            return logits[:, :, 1:]
        return logits * float("nan") if wrong == "nan" else logits.flip(1)

    assert compare(samples, trained.model, [1])["iou"] == 1.0
    with pytest.raises(InputError, match="exported model"):
        compare(samples, run, [1])


def test_an_onnx_folder_has_all_that_a_script_needs(folder: Path) -> None:
    names = {"model.onnx", "model.onnx.check.json", "vocab.txt", "settings.json"}
    assert {p.name for p in folder.iterdir()} == names
    report = json.loads((folder / "model.onnx.check.json").read_text())
    assert report["largest_difference"] < 1e-4
    assert {row["batch"] for row in report["rows"]} == {1, 3}
    tokenizer = load_tokenizer(TINY_BERT)
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert words == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["img_size"], settings["max_tokens"]) == (SIDE, 20)
    assert settings["do_lower_case"] is True


def script() -> str:
    """The script of the docs."""
    text = DOCS.read_text(encoding="utf-8")
    found = re.search(r"<!-- script -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def test_the_script_in_the_docs_segments_without_torch(folder: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "segment.py", tmp_path / "mask.png"
    path.write_text(script(), encoding="utf-8")
    photo = sorted(IMAGES.iterdir())[0]
    argv = [str(path), str(folder), str(photo), EXPRESSIONS[0], str(output)]
    code = f"{NO_TORCH}import runpy; sys.argv = {argv!r}; runpy.run_path({str(path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)
    trained = build()
    with Image.open(photo) as image:
        rgb = image.convert("RGB")
    expected = Predictor(trained.model, trained.tokenizer, SIDE).predict(rgb, EXPRESSIONS[:1])
    mask, other = np.asarray(Image.open(output)) > 0, expected[0].mask
    assert mask.shape == other.shape
    assert 0 < other.mean() < 1
    assert (mask & other).sum() / (mask | other).sum() >= 0.99


def test_the_script_tokenises_as_the_project_does(folder: Path) -> None:
    """Its lines from the settings to the tokens, for each expression."""
    text = script()
    lines = text[text.index("s = json") : text.index("image = ")]
    ids, mask = encode(load_tokenizer(TINY_BERT), EXPRESSIONS, 20)
    for expression, row, n in zip(EXPRESSIONS, ids.tolist(), mask.sum(1).tolist(), strict=True):
        names: dict[str, object] = {"folder": str(folder), "expression": expression}
        exec("import json, re, unicodedata\nimport numpy as np\n" + lines, names)
        assert names["input_ids"].tolist() == [row[:n] + [0] * (20 - n)]  # type: ignore[attr-defined]


def test_one_line_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["--resume", str(tmp_path / "none.pth"), "--output", str(tmp_path / "x.pt2")]
    assert "none.pth" in one_line_error(main, [*base, "--format", "torch"])
    assert "--img_size 0" in one_line_error(main, [*base, "--format", "torch", "--img_size", "0"])
    assert "--batch 0" in one_line_error(main, [*base, "--format", "torch", "--batch", "0"])
    wrong = [*base[:2], "--format", "torch", "--output", str(tmp_path)]
    assert ".pt2" in one_line_error(main, wrong)
    with pytest.raises(InputError, match="--images"):
        read_samples(build(), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="onnxruntime: pip install"):
        export_onnx(build(), arguments("onnx", tmp_path))
