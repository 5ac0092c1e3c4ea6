"""The page's logic, with a stand-in for the model."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from bert import load_tokenizer
from data.refshapes.generate import write_bert
from lib.errors import InputError
from lib.predictor import Predictor
from tests.fake_predictor import COLORS, FakePredictor
from tests.refer_files import TINY_BERT
from tools.web import __main__ as web
from tools.web import answers, examples


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    """400 x 300; a red box of 100 x 90 pixels, a green one of 40 x 40."""
    image = Image.new("RGB", (400, 300), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((20, 30, 119, 119), fill=COLORS["red"])
    pen.rectangle((300, 200, 339, 239), fill=COLORS["green"])
    path = tmp_path / "boxes.png"
    image.save(path)
    return path


def predict(file: Path | None, text: str, **options: Any) -> answers.Result:
    return answers.predict(FakePredictor(), file, text, **options)  # type: ignore[arg-type]


def test_expressions_are_lines() -> None:
    text = " the red  box \n\n\tdog\r\nthe red box\n"
    assert answers.read_expressions(text) == ["the red box", "dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n\t", "No expression"),
        ("\n".join(map(str, range(17))), "17 expressions: at most 16"),
        ("x" * 10_001, "10001 characters"),
    ],
)
def test_bad_text_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        answers.read_expressions(text)


def test_bad_images_are_one_line_without_the_servers_path(tmp_path: Path, image_file: Path) -> None:
    text_file = tmp_path / "no image.jpg"
    text_file.write_text("hello")
    cases = [
        (None, answers.MAX_EXPRESSIONS, "No image: drop one"),
        (text_file, 10**6, "no image.jpg is not an image"),
        (tmp_path / "gone.png", 10**6, "gone.png does not exist"),
        (image_file, 119_999, "boxes.png has 400x300 pixels: at most 119,999 are taken here$"),
    ]
    for file, most, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            predict(file, "the red box", max_pixels=most)
        assert str(tmp_path) not in str(caught.value)


@given(st.floats(0, 1, width=32), st.integers(1, 99))
def test_levels_decide_as_the_probability_does(p: float, hundredths: int) -> None:
    probability = np.array([[p]], np.float32)
    level = answers.to_levels(probability > 0.5, probability)[0, 0]
    assert (level > hundredths) == (float(np.float32(p)) > hundredths / 100)


def test_at_a_half_the_mask_is_the_models_own() -> None:
    """Even where rounding has put the probability on the other side."""
    mask = np.array([[True, False, True, False]])
    levels = answers.to_levels(mask, np.array([[0.5, 0.500001, 0.2, 0.9]], np.float32))
    assert (levels > 50).tolist() == mask.tolist()


def test_overlays_follow_the_threshold_without_the_model(image_file: Path) -> None:
    model = FakePredictor()
    text = "the red box\ngreen"
    result = answers.predict(model, image_file, text)  # type: ignore[arg-type]
    assert model.calls == ["the red box", "green"]
    captions = [caption for _, caption in answers.draw_masks(result, 0.5)]
    assert captions[0] == "the red box\nscore 0.90 · 7.5 % of the image"
    assert captions[1] == "green\nscore 0.90 · 1.4 % of the image"
    everything = [caption for _, caption in answers.draw_masks(result, 0.05)]
    assert everything[0] == "the red box\nscore 0.90 · 100.0 % of the image"
    assert model.calls == ["the red box", "green"]
    image = answers.draw_masks(result, 0.5)[0][0]
    assert image.size == (400, 300)
    outside, inside = image.getpixel((200, 20)), image.getpixel((70, 75))
    assert max(outside) < 255  # type: ignore[arg-type,type-var]  dimmed
    assert inside != COLORS["red"]  # tinted


def test_notes_name_empty_masks_and_cut_expressions(image_file: Path) -> None:
    result = predict(image_file, "zebra\nthe red box that is on the left")
    assert answers.notes(result, 0.5) == [
        "Nothing found for “zebra” at threshold 0.50.",
        "Only the first 6 tokens of “the red box that is on the left” are read.",
    ]
    assert answers.draw_masks(result, 0.5)[0][1] == "zebra\nnothing found"
    assert len(answers.notes(result, 0.95)) == 3
    assert len(answers.notes(result, 0.05)) == 1


def test_large_images_are_shown_smaller_but_written_whole(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 1000), COLORS["red"]).save(tmp_path / "wide.png")
    result = predict(tmp_path / "wide.png", "red")
    assert answers.draw_masks(result, 0.5)[0][0].size == (1280, 427)
    assert answers.draw_probabilities(result)[0][0].size == (1280, 427)
    written = answers.write_files(result, 0.5, tmp_path / "out")
    assert Image.open(written[0]).size == (3000, 1000)


def test_files_are_the_masks_at_the_threshold(image_file: Path, tmp_path: Path) -> None:
    result = predict(image_file, "the red box\nTHE red box!\n../../etc")
    written = answers.write_files(result, 0.5, tmp_path / "out")
    assert [path.name for path in written] == [
        "boxes_the-red-box.mask.png",
        "boxes_the-red-box.rle.json",
        "boxes_the-red-box-2.mask.png",
        "boxes_the-red-box-2.rle.json",
        "boxes_etc.mask.png",
        "boxes_etc.rle.json",
    ]
    mask = np.asarray(Image.open(written[0]))
    assert np.unique(mask).tolist() == [0, 255]
    assert int((mask > 0).sum()) == 100 * 90
    rle = json.loads(written[1].read_text())
    assert np.array_equal(coco_mask.decode(rle) * 255, mask)
    everything = answers.write_files(result, 0.05, tmp_path / "all")
    assert np.asarray(Image.open(everything[0])).all()


def test_long_expressions_are_cut_in_captions(image_file: Path) -> None:
    result = predict(image_file, "x" * 101)
    ((_, caption),) = answers.draw_masks(result, 0.5)
    ((_, of_map),) = answers.draw_probabilities(result)
    short = "x" * 99 + "…"
    assert (caption, of_map) == (f"{short}\nnothing found", short)
    assert answers.notes(result, 0.5) == [f"Nothing found for “{short}” at threshold 0.50."]


def test_probability_maps_are_brighter_inside(image_file: Path) -> None:
    ((image, caption),) = answers.draw_probabilities(predict(image_file, "red"))
    assert caption == "red"
    brightness = np.asarray(image.convert("L"))
    assert brightness[75, 70] > brightness[20, 200] + 50


def test_attention_of_an_expression(image_file: Path) -> None:
    result = predict(image_file, "red\nthe green box")
    model: Any = FakePredictor()
    assert answers.draw_attention(model, result, 1).width == 300  # three words
    model.attention = False
    with pytest.raises(InputError, match=r"^this model has no attention to words"):
        answers.draw_attention(model, result, 0)
    image_file.unlink()
    with pytest.raises(InputError, match=r"boxes\.png does not exist"):
        answers.draw_attention(model, result, 0)


def test_progress_counts_the_expressions(image_file: Path) -> None:
    seen: list[str] = []

    def progress(expressions: Any) -> Any:
        for expression in expressions:
            yield expression
            seen.append(expression)

    predict(image_file, "red\ngreen", progress=progress)
    assert seen == ["red", "green"]


def test_examples_suit_the_model(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert", 64, 1)
    shapes, other = load_tokenizer(tmp_path / "bert"), load_tokenizer(TINY_BERT)
    drawn = examples.choose_examples("", shapes, tmp_path / "scenes", 10**8)
    assert len(drawn) == examples.SCENES
    photos = examples.choose_examples("", other, tmp_path / "none", 10**8)
    assert len(photos) == 4
    for path, lines in [*drawn, *photos]:
        assert path.is_file()
        assert lines
        assert answers.read_expressions("\n".join(lines)) == lines


def test_given_examples(tmp_path: Path, image_file: Path) -> None:
    entries = [{"image": image_file.name, "sentence": ["red", "green"]}]
    (tmp_path / "list.json").write_text(json.dumps(entries))

    def choose(given: Path) -> list[examples.Example]:
        return examples.choose_examples(str(given), None, tmp_path, 10**8)  # type: ignore[arg-type]

    assert choose(tmp_path / "list.json") == [(image_file, ["red", "green"])]
    assert choose(tmp_path) == [(image_file, [])]
    with pytest.raises(InputError, match=r"^--examples .*nothing\.json does not exist"):
        choose(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --resume FILE, or --pretrained"),
        (["--resume", "a", "--pretrained", "b"], "give only one of --resume and --pretrained"),
        (["--resume", "a", "--max-pixels", "0"], "--max_pixels 0: must be above 0"),
        (["--resume", "a", "--port", "70000"], "^--port 70000: give 1 to 65535, or 0 for a free"),
        (["--resume", "a", "--port", "-1"], "^--port -1: give 1 to 65535"),
        (["--resume", "a", "--host", ""], '^--host "": give an address'),
        (["--resume", "a", "--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
    ],
)
def test_bad_flags_are_one_line(argv: list[str], message: str) -> None:
    pytest.importorskip("gradio")
    with pytest.raises(InputError, match=message):
        web.main(argv)


def test_a_busy_port_is_one_line() -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(InputError, match=f"--port {port}: Address already in use"):
            web.main(["--resume", "a", "--port", port])


def test_without_gradio_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -r requirements-web\.txt"):
        web.main(["--resume", "a"])


def test_flags_reach_the_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    class Stop(Exception):
        pass

    def take(*args: Any, **options: Any) -> None:
        given.append((args, options))
        raise Stop

    pytest.importorskip("gradio")
    monkeypatch.setattr(Predictor, "from_checkpoint", take, raising=False)
    monkeypatch.setattr(Predictor, "from_pretrained", take, raising=False)
    port, bert = ["--port", "0"], ["--bert_tokenizer", "folder", "--ck_bert", "other"]
    with pytest.raises(Stop):
        web.main(["--resume", "x.pth", "--device", "cpu", "--amp", "bf16", *bert, *port])
    with pytest.raises(Stop):
        web.main(["--pretrained", "owner/name", *port])
    text = {"flags": {"bert_tokenizer": "folder", "ck_bert": "other"}}
    assert given[0] == (("x.pth",), {"device": "cpu", "amp": "bf16", **text})
    assert given[1] == (("owner/name",), {"device": None, "amp": "off", "flags": {}})
