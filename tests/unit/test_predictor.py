"""From an image and expressions to masks: images of all kinds, batches, attention, docs."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bert import config_values, load_tokenizer, tokenizer_text
from lib.checkpoint import read_checkpoint, write_checkpoint
from lib.checkpoint.pretrained import write_folder
from lib.checkpoint.rebuild import open_trained
from lib.errors import InputError
from lib.predictor import Predictor
from lib.segmentation import build_model
from lib.swin import SWIN_SIZES, SwinSize
from lib.variants import PUBLISHED
from tests.refer_files import TINY_BERT

TEXTS = ["the blue one", "left", "a dog on the right of the cat"]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint as train.py writes it, without the training state."""
    monkeypatch.setitem(SWIN_SIZES, "nano", SwinSize(8, (2, 2, 2, 2), (1, 2, 4, 8)))
    torch.manual_seed(0)
    model = build_model("lavt", swin_type="nano", window_size=7, text_config=str(TINY_BERT))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    bert = {
        "config": config_values(model.text_config),
        "tokenizer": tokenizer_text(load_tokenizer(TINY_BERT)),
    }
    args = {"model": "lavt", "swin_type": "nano", "img_size": 64, "max_tokens": 8, "text": "raw"}
    args |= asdict(PUBLISHED) | {"mha": ""}
    file = tmp_path / "model_best_refcoco.pth"
    write_checkpoint({**model.to_published(), "bert": bert, "args": args}, file)
    return file


@pytest.fixture
def predictor(path: Path) -> Predictor:
    return Predictor.from_checkpoint(path, "cpu")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_predictions_have_the_size_of_the_image(predictor: Predictor) -> None:
    assert (predictor.img_size, predictor.max_tokens) == (64, 8)
    found = predictor.predict(photo(50, 30), TEXTS)
    assert [p.expression for p in found] == TEXTS
    for p in found:
        assert (p.mask.shape, p.mask.dtype) == ((30, 50), np.bool_)
        assert (p.probability.shape, p.probability.dtype) == ((30, 50), np.float32)
        assert 0 <= p.probability.min() <= p.probability.max() <= 1
        assert ((p.probability > 0.5) == p.mask).mean() > 0.999
        inside = p.probability[p.mask].astype(np.float64)
        assert p.score == pytest.approx(inside.mean() if p.mask.any() else 0)
    assert any(0 < p.mask.mean() < 1 for p in found)


def test_all_kinds_of_one_image_are_equal(predictor: Predictor, tmp_path: Path) -> None:
    image = photo(40, 30)
    array = np.asarray(image)
    image.save(tmp_path / "a.png")
    bytes_ = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds: list[Any] = [image, array, array[::1], bytes_, bytes_ / 255, (bytes_ / 255).double()]
    kinds += [tmp_path / "a.png", str(tmp_path / "a.png"), image.convert("RGBA")]
    expected = predictor.predict(kinds[0], "left")[0].probability
    for kind in kinds[1:]:
        assert np.array_equal(predictor.predict(kind, ["left"])[0].probability, expected)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"\(H, W, 3\) uint8 in RGB, not \(3, 8, 8\) uint8"),
        (np.zeros((8, 8, 3), np.float32), "not .* float32"),
        (np.zeros((8, 8), np.uint8), r"not \(8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"not \(0, 8, 3\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"\(3, H, W\) in RGB, not \(8, 8, 3\)"),
        (torch.zeros(1, 3, 8, 8), r"not \(1, 3, 8, 8\)"),
        (torch.full((3, 8, 8), 1.5), r"in \[0, 1\]: give it before it is normalised"),
        (torch.full((3, 8, 8), float("nan")), r"in \[0, 1\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "not torch.int64"),
        (Image.new("RGB", (0, 4)), "the image has 0x4 pixels"),
        ([[1]], "not list"),
        (None, "not NoneType"),
        ("nowhere.png", "nowhere.png does not exist"),
    ],
)
def test_what_is_no_image_is_named(image: Any, says: str, predictor: Predictor) -> None:
    with pytest.raises(InputError, match=says):
        predictor.predict(image, "left")


@pytest.mark.parametrize("wrong", [0, None, b"left"])
def test_what_is_no_expression_is_named(wrong: Any, predictor: Predictor) -> None:
    kind = type(wrong).__name__
    with pytest.raises(InputError, match=f"is of type {kind}, not str"):
        predictor.predict(photo(9, 9), ["left", wrong])
    with pytest.raises(InputError, match=f"expressions are texts, not {kind}"):
        predictor.predict(photo(9, 9), wrong)
    with pytest.raises(InputError, match=f"is of type {kind}, not str"):
        predictor.attention(photo(9, 9), wrong)
    with pytest.raises(InputError, match="takes pairs of image and expressions"):
        predictor.predict_batch([wrong])


def test_what_a_file_does_not_tell_may_be_given_and_is_said(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = read_checkpoint(path)
    del content["args"]
    write_checkpoint(content, path)
    wanted = Predictor.from_checkpoint(path, "cpu", img_size=64).predict(photo(20, 20), "left")
    assert "not in the file, taken as published: mha 1-1-1-1" in caplog.text
    flags = {"mha": "2-1-1-1"}
    other = Predictor.from_checkpoint(path, "cpu", flags=flags, img_size=64)
    assert other.settings["mha"] == "2-1-1-1"
    assert not np.array_equal(
        other.predict(photo(20, 20), "left")[0].probability, wanted[0].probability
    )


def test_a_damaged_image_of_pil(predictor: Predictor, tmp_path: Path) -> None:
    photo(300, 200).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    with Image.open(tmp_path / "b.jpg") as image, pytest.raises(InputError, match="cannot be read"):
        predictor.predict(image, "left")


def test_a_batch_of_images_of_any_size_is_each_alone(path: Path) -> None:
    sizes = [(40, 30), (7, 90), (1, 1), (64, 64)]
    pairs = [(photo(*size, seed=i), TEXTS[: i % 4]) for i, size in enumerate(sizes)]
    pairs += [(pairs[0][0], ["left"])]
    expected = Predictor.from_checkpoint(path, "cpu")
    for batch_size in (1, 2, 8):
        predictor = Predictor.from_checkpoint(path, "cpu", batch_size=batch_size)
        for (image, texts), found in zip(pairs, predictor.predict_batch(pairs), strict=True):
            alone = [expected.predict(image, [text])[0] for text in texts]
            assert [p.expression for p in found] == list(texts)
            for a, b in zip(found, alone, strict=True):
                assert np.array_equal(a.mask, b.mask)
                assert np.array_equal(a.probability, b.probability)
                assert a.mask.shape == (image.height, image.width)
    assert expected.predict_batch([]) == []
    assert expected.predict(pairs[0][0], []) == []


def test_attention_of_each_word(predictor: Predictor) -> None:
    words, maps = predictor.attention(photo(40, 30), "left dog")
    assert (words[0], words[-1]) == ("[CLS]", "[SEP]")
    assert [m.shape for m in maps] == [(len(words), s, s) for s in (16, 8, 4, 2)]
    for stage in maps:
        assert stage.sum(0) == pytest.approx(np.ones(stage.shape[1:]), abs=1e-5)
    prediction = predictor.predict(photo(40, 30), "left dog")[0]
    assert predictor.draw_attention(photo(40, 30), "left dog", prediction).width > 100


def test_other_sizes_than_trained(path: Path) -> None:
    predictor = Predictor.from_checkpoint(path, "cpu", img_size=96, max_tokens=4)
    assert (predictor.img_size, predictor.max_tokens) == (96, 4)
    assert predictor.logits(photo(9, 9), TEXTS).shape == (3, 2, 96, 96)
    assert predictor.is_cut(TEXTS[2])
    with pytest.raises(InputError, match="--max_tokens 99: the text encoder has 64 positions"):
        Predictor.from_checkpoint(path, "cpu", max_tokens=99)
    wrong: list[dict[str, Any]] = [{"amp": "half"}, {"device": "cuda:77"}, {"device": "gpu"}]
    wrong += [{n: v} for n in ("img_size", "max_tokens", "batch_size") for v in (0, -1, "9", 9.0)]
    for options in wrong:
        with pytest.raises(InputError):
            Predictor.from_checkpoint(path, **options)  # type: ignore[arg-type]


def test_from_pretrained(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bert.hub.hub_answers", lambda name: False)
    write_folder(tmp_path / "folder", open_trained(path, accelerate=False), "")
    first = Predictor.from_checkpoint(path, "cpu").predict(photo(40, 30), TEXTS)
    folder = Predictor.from_pretrained(tmp_path / "folder", device="cpu")
    for a, b in zip(first, folder.predict(photo(40, 30), TEXTS), strict=True):
        assert np.array_equal(a.probability, b.probability)
    # As the hub's cache holds it, without a network.
    cache = tmp_path / "hub/models--me--lavt"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    (cache / "snapshots").mkdir()
    (tmp_path / "folder").rename(cache / "snapshots/abc")
    cached = Predictor.from_pretrained("me/lavt", device="cpu", cache_dir=tmp_path / "hub")
    assert np.array_equal(cached.predict(photo(40, 30), TEXTS[0])[0].mask, first[0].mask)
    with pytest.raises(InputError, match="'me/other': it is not in the cache, and the hub cannot"):
        Predictor.from_pretrained("me/other", cache_dir=tmp_path / "hub")
    with pytest.raises(InputError, match="neither a folder nor the name of a model"):
        Predictor.from_pretrained("../a b")


def test_the_example_of_the_documentation(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/python.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example
    (tmp_path / "checkpoints").mkdir()
    path.rename(tmp_path / "checkpoints/model_best_refcoco.pth")
    photo(60, 40).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(example[1], "docs/python.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"the man in red: score 0\.\d\d, \d+\.\d% of the image", lines[0])
