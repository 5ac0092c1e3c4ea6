"""demo_inference.py with a tiny untrained model: files, sizes, names, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.nn import functional as F

import demo_inference as demo
from bert import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.transforms import normalize
from lib import checkpoint
from lib.errors import InputError
from lib.evaluation.evaluator import resize_prediction
from lib.lavt import LAVT
from lib.predictor import Predictor, open_upright
from lib.segmentation import build_model
from lib.variants import Variant
from refer.refer import REFER
from tests.refer_files import CC0_ROOT, TINY_BERT
from tools.demo_jobs import plan

REPO = Path(__file__).parents[2]
SIZE = 56
ALL = ("--mask", "--rle", "--prob")
Capture = pytest.CaptureFixture[str]


def build(object_bias: float | None = None) -> LAVT:
    """A model of random weights; with a bias its masks are full or empty."""
    torch.manual_seed(0)
    model = build_model("lavt", swin_type="micro", window_size=7, text_config=TINY_BERT)
    if object_bias is not None:
        last = model.classifier.get_submodule("conv1_1")
        torch.nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        last.bias.data = torch.tensor([0.0, object_bias])
    return model.eval()


def save(model: LAVT, path: Path) -> Path:
    checkpoint.write_checkpoint(dict(model.to_published()), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build(), tmp_path_factory.mktemp("weights") / "random.pth")


@pytest.fixture(scope="module")
def empty_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build(-5.0), tmp_path_factory.mktemp("weights") / "nothing.pth")


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "photo.jpg"
    path.parent.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).resize((160, 120)).save(path)
    return path


def options(weights: Path) -> list[str]:
    return (
        f"--swin_type micro --img_size {SIZE} --device cpu --resume {weights} "
        f"--ck_bert {TINY_BERT} --bert_tokenizer {TINY_BERT}"
    ).split()


def run(weights: Path, *argv: str | Path) -> None:
    demo.main([*options(weights), *map(str, argv)])


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_writes_what_was_asked_for(
    tmp_path: Path, image_file: Path, weights: Path, capsys: Capture
) -> None:
    out = tmp_path / "new" / "out"
    run(weights, "--image", image_file, "--sentence", "Red one!", "--output", out, *ALL)
    stem = "photo_red-one"
    assert files(out) == [f"{stem}{e}" for e in (".mask.png", ".png", ".prob.png", ".rle.json")]
    with Image.open(out / f"{stem}.png") as image:
        assert image.size == (160, 120)
    with Image.open(out / f"{stem}.mask.png") as image:
        assert (image.mode, image.size) == ("L", (160, 120))
        mask = np.asarray(image)
    assert set(np.unique(mask)) == {0, 255}
    rle = json.loads((out / f"{stem}.rle.json").read_text())
    assert rle["size"] == [120, 160]
    assert (coco_mask.decode(rle) * 255 == mask).all()
    with Image.open(out / f"{stem}.prob.png") as image:
        assert image.mode.startswith("I")
        assert ((np.asarray(image) > 65535 / 2) == (mask > 0)).all()
    row = next(line for line in capsys.readouterr().out.splitlines() if "Red one!" in line)
    assert row.split()[0] == "photo.jpg"
    assert f"{(mask > 0).mean():.2%}" in row
    assert row.endswith(str(out / f"{stem}.png"))


def test_attention_figure(tmp_path: Path, image_file: Path, weights: Path) -> None:
    """A column a word; the overlay beside it is as it would be without."""
    words_given = ("--image", image_file, "--sentence", "red", "the big red one")
    run(weights, *words_given, "--output", tmp_path / "a")
    run(weights, *words_given, "--output", tmp_path / "b", "--attention")
    few, many = "photo_red", "photo_the-big-red-one"
    figures = [f"{few}.attention.png", f"{many}.attention.png"]
    assert files(tmp_path / "b") == sorted([f"{few}.png", f"{many}.png", *figures])
    for stem in (few, many):
        name = f"{stem}.png"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with (
        Image.open(tmp_path / "b" / figures[0]) as one,
        Image.open(tmp_path / "b" / figures[1]) as two,
    ):
        assert one.height == two.height
        assert two.width - one.width >= 3 * 160


def test_no_attention_to_draw(tmp_path: Path, image_file: Path) -> None:
    torch.manual_seed(0)
    variant = Variant(fusion="concat")
    model = build_model(
        "lavt", swin_type="micro", window_size=7, text_config=TINY_BERT, variant=variant
    )
    path = save(model, tmp_path / "plain.pth")
    line = ("--image", image_file, "--sentence", "red", "--output", tmp_path / "out", "--attention")
    with pytest.raises(InputError, match="no attention to words to show"):
        run(path, *line, "--fusion", "concat")
    assert files(tmp_path / "out") == []


def test_only_the_overlay_by_default_and_as_named(
    tmp_path: Path, image_file: Path, weights: Path
) -> None:
    out = tmp_path / "out" / "seen.jpg"
    run(weights, "--image", image_file, "--sentence", "red", "--output", out)
    assert files(out.parent) == ["seen.jpg"]
    with Image.open(out) as image:
        assert (image.format, image.size) == ("JPEG", (160, 120))


def test_caption_is_a_band(tmp_path: Path, image_file: Path, weights: Path) -> None:
    out = tmp_path / "seen.png"
    run(weights, "--image", image_file, "--sentence", "red", "--caption", "--output", out)
    with Image.open(out) as image:
        assert image.width == 160
        assert image.height > 120


def test_the_input_is_that_of_training() -> None:
    model, tokenizer = build(), load_tokenizer(TINY_BERT)
    refer = REFER(CC0_ROOT, "refcoco", "unc")
    dataset = ReferDataset(refer, "val", tokenizer, SIZE)
    sample = dataset[0]
    with torch.inference_mode():
        expected = model(
            normalize(sample["image"])[None],
            sample["input_ids"][None],
            sample["attention_mask"][None],
        )
    record = dataset.records[0]
    upright = open_upright(refer.image_path(record.image_id))
    logits = Predictor(model, tokenizer, SIZE).logits(upright, [record.expression])
    assert torch.equal(logits, expected)


def test_mask_is_the_argmax_of_resized_logits() -> None:
    logits = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    prediction = resize_prediction(logits, 33, 21)
    full = F.interpolate(logits[None], (33, 21), mode="bilinear", align_corners=False)[0]
    assert (prediction.mask == (full[1] > full[0]).numpy()).all()
    assert prediction.probability == pytest.approx(
        torch.sigmoid(full[1] - full[0]).numpy(), abs=1e-6
    )
    assert 0 < prediction.mask.mean() < 1


def test_expressions_of_a_batch_do_not_mix() -> None:
    model, tokenizer = build(), load_tokenizer(TINY_BERT)
    sizes: list[int] = []
    model.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    expressions = ["red", "the blue one on the left", "", "?!"]
    predictor = Predictor(model, tokenizer, SIZE, batch_size=3)
    together = predictor.logits(image, expressions)
    assert sizes == [1, 1, 1, 1]  # on a CPU, so that bits do not depend on the others
    for expression, logits in zip(expressions, together, strict=True):
        assert torch.equal(predictor.logits(image, expression)[0], logits)


def test_exif_orientation_is_applied(tmp_path: Path, image_file: Path, weights: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    with Image.open(image_file) as image:
        image.save(tmp_path / "turned.jpg", exif=exif)
    run(weights, "--image", tmp_path / "turned.jpg", "--sentence", "a", "--output", tmp_path / "o")
    with Image.open(tmp_path / "o" / "turned_a.png") as image:
        assert image.size == (120, 160)


@pytest.mark.filterwarnings("error")
def test_damaged_exif_does_no_harm(tmp_path: Path, image_file: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(image_file) as image:
        image.save(tmp_path / "undamaged.jpg", exif=exif)
    undamaged = (tmp_path / "undamaged.jpg").read_bytes()
    start = undamaged.find(b"Exif")
    sizes = set()
    for place in range(start, start + 32):
        damaged = undamaged[:place] + bytes([undamaged[place] ^ 0xFF]) + undamaged[place + 1 :]
        (tmp_path / "damaged.jpg").write_bytes(damaged)
        sizes.add(open_upright(tmp_path / "damaged.jpg").size)
    assert sizes == {(160, 120), (120, 160)}


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16"])
def test_images_of_any_mode_and_of_one_pixel(tmp_path: Path, weights: Path, mode: str) -> None:
    Image.new(mode, (1, 1)).save(tmp_path / "dot.png")
    run(weights, "--image", tmp_path / "dot.png", "--sentence", "", "--output", tmp_path / "o")
    with Image.open(tmp_path / "o" / "dot_sentence.png") as image:
        assert image.size == (1, 1)


def test_warning_of_an_empty_mask(
    tmp_path: Path, image_file: Path, empty_weights: Path, capsys: Capture
) -> None:
    run(
        empty_weights,
        "--image",
        image_file,
        "--sentence",
        "red",
        "--output",
        tmp_path / "o",
        "--rle",
    )
    printed = capsys.readouterr().out
    assert "0.00%" in printed
    assert 'warning: the mask of photo.jpg is empty for "red"' in printed
    assert coco_mask.area(json.loads((tmp_path / "o" / "photo_red.rle.json").read_text())) == 0


def test_warning_of_a_long_expression(
    tmp_path: Path, image_file: Path, weights: Path, capsys: Capture
) -> None:
    words_given = ["the one " * 9, "the one " * 10]  # 18 and 20 words, [CLS] and [SEP]
    run(weights, "--image", image_file, "--sentence", *words_given, "--output", tmp_path / "o")
    assert capsys.readouterr().out.count("warning: the model reads only the first 20 tokens") == 1


def test_a_folder_is_finished_despite_a_damaged_image(
    tmp_path: Path, image_file: Path, weights: Path, capsys: Capture
) -> None:
    folder, out = image_file.parent, tmp_path / "out"
    (folder / "bad.jpg").write_bytes(image_file.read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    (folder / "._photo.jpg").write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        run(weights, "--image", folder, "--sentence", "red", "blue", "--output", out)
    assert stopped.value.code == 1
    assert files(out) == ["photo_blue.png", "photo_red.png"]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith("error: image ")
    assert "bad.jpg" in errors[0]
    assert errors[1] == "error: 1 of 2 images could not be read"


def test_list_of_images_and_expressions(tmp_path: Path, image_file: Path, weights: Path) -> None:
    pairs = [
        {"image": "in/photo.jpg", "sentence": "red"},
        {"image": str(image_file), "sentence": ["red", "blue"], "note": "ignored"},
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8-sig")
    run(weights, "--list", tmp_path / "pairs.json", "--output", tmp_path / "out")
    assert files(tmp_path / "out") == ["photo_blue.png", "photo_red-2.png", "photo_red.png"]


def test_names_stay_apart_and_short(tmp_path: Path) -> None:
    expressions = ["a/b: c", "A b C", "../..", "x" * 500, "左の猫" * 99, "\ud800", "é"]
    jobs = plan([(Path("in") / ("p" * 250 + ".jpg"), expressions)], tmp_path)
    names = [path.name for path in jobs[0].overlays]
    assert all(path.parent == tmp_path for path in jobs[0].overlays)
    assert len({name.lower() for name in names}) == len(expressions)
    assert all(len(name.encode()) < 200 for name in names)
    assert names[0].endswith("_a-b-c.png")
    assert names[1].endswith("_a-b-c-2.png")


def test_does_not_overwrite_an_image(tmp_path: Path, image_file: Path, weights: Path) -> None:
    before = image_file.read_bytes()
    with pytest.raises(InputError, match="would overwrite an image"):
        run(weights, "--image", image_file, "--sentence", "a", "--output", image_file)
    masked = image_file.with_name("x.mask.png")
    Image.new("RGB", (9, 9)).save(masked)
    with pytest.raises(InputError, match="would overwrite an image"):
        run(weights, "--image", masked, "--sentence", "a", "--output", masked.with_name("x.png"))
    with pytest.raises(InputError, match="images' own folder"):
        run(weights, "--image", image_file.parent, "--sentence", "a", "--output", image_file.parent)
    assert image_file.read_bytes() == before
    assert files(image_file.parent) == ["photo.jpg", "x.mask.png"]


BAD_LISTS = ["{}", "[]", "[3]", '[{"image": "a.jpg"}]', '[{"image": 1, "sentence": "a"}]', "[{", ""]
BAD_LISTS += ['[{"image": "a.jpg", "sentence": []}]', '[{"image": "a.jpg", "sentence": [1]}]']


@pytest.mark.parametrize("text", [*BAD_LISTS, "[" * 100000])
def test_bad_list(tmp_path: Path, weights: Path, text: str) -> None:
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(InputError, match=r"--list .*l\.json"):
        run(weights, "--list", tmp_path / "l.json", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            "",
            "--image is missing: give an image or a folder, like python demo_inference.py --image",
        ),
        ("--image P", "--sentence is missing"),
        ("--image P --sentence a --resume=", "--resume is missing"),
        ("--image nowhere.jpg --sentence a", "--image nowhere.jpg does not exist"),
        ("--image EMPTY --sentence a", "no image in the folder"),
        ("--image TEXT --sentence a", "is not an image"),
        ("--image P --sentence a --resume nowhere.pth", "no checkpoint at nowhere.pth"),
        ("--image P --sentence a --swin_type tiny", "--swin_type tiny contradicts "),
        ("--image P --sentence a b --output one.png", "one file for 2 overlays"),
        ("--image P --sentence a --output one.gif", "overlays are written as .png"),
        ("--image P --sentence a --output TEXT", "cannot be made"),
        ("--image P --sentence a --output TEXT/o", "cannot be made"),
        ("--image P --list l.json", "--list names images and expressions: remove --image"),
        ("--list nowhere.json", "--list nowhere.json does not exist"),
        ("--image P --sentence a --img_size 0", "--img_size 0"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, image_file: Path, weights: Path, argv: str, says: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no image")
    named = {"P": str(image_file), "EMPTY": str(tmp_path / "empty"), "TEXT": str(tmp_path / "text")}
    words = [named.get(word, word) for word in argv.split()]
    words = [word.replace("TEXT/", named["TEXT"] + "/") for word in words]
    default = [] if "--output" in words else ["--output", str(tmp_path / "out")]
    with pytest.raises(InputError) as error:
        run(weights, *default, *words)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert files(image_file.parent) == ["photo.jpg"]
    assert not list(tmp_path.glob("out/*"))
    assert not Path("one.png").exists()


def script(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "demo_inference.py", *argv],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_script_without_options_says_how() -> None:
    done = script()
    assert done.returncode == 2
    assert done.stderr.startswith("error: --image is missing: give an image")
    assert len(done.stderr.splitlines()) == 1


def test_script_over_a_folder_with_a_damaged_image(
    tmp_path: Path, image_file: Path, weights: Path
) -> None:
    (image_file.parent / "bad.png").write_text("no image")
    argv = [
        "--image",
        str(image_file.parent),
        "--sentence",
        "red",
        "--output",
        str(tmp_path / "out"),
    ]
    done = script(*options(weights), *argv)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "bad.png is not an image" in done.stderr
    assert files(tmp_path / "out") == ["photo_red.png"]
