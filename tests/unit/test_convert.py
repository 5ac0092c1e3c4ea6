"""refer.convert: five kinds of input, and what is wrong with them."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.refshapes.generate import generate
from refer import check
from refer.convert.__main__ import main
from refer.convert.build import read_mask
from refer.masks import run_lengths
from refer.refer import REFER
from tests.own_data import OwnData, write_csv
from tests.scripts import one_line_error

WIDTH, HEIGHT = 16, 12
SQUARE = [2, 2, 8, 2, 8, 8, 2, 8]  # 6x6 pixels
ORIENTATION = 0x0112
MISSING = object()


def square() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:8, 2:8] = True
    return mask


def write_image(path: Path, orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    exif = Image.Exif()
    if orientation > 1:
        exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images, and the mask of the square."""
    folder = tmp_path / "photos"
    for name in ("a.png", "b.png", "c.png"):
        write_image(folder / name)
    Image.fromarray(square()).save(folder / "m.png")
    return folder


def lines(photos: Path, *records: Any) -> Path:
    """Writes JSON lines; a record is completed by image, expression and square."""
    usual = {"image": "a.png", "expressions": ["the square"], "mask": "m.png", "split": "train"}
    text = ""
    for record in records:
        whole = record if isinstance(record, str) else json.dumps(complete(usual, record))
        text += whole + "\n"
    path = photos / "lines.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def complete(usual: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    if "segmentation" in record:
        usual = {key: value for key, value in usual.items() if key != "mask"}
    return {key: value for key, value in (usual | record).items() if value is not MISSING}


def root_of(path: Path) -> Path:
    """The data root that an input, or its folder, is converted to."""
    return (path if path.is_dir() else path.parent).parent / "data"


def converted(path: Path, *options: str, name: str = "own", code: int = 0) -> REFER:
    """The dataset that a conversion makes."""
    root = root_of(path)
    argv = ["--input", str(path), "--out", str(root / name), *options]
    if code:
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == code
    else:
        main(argv)
    return REFER(root, name)


def error(path: Path, *options: str) -> str:
    """The error of a conversion, which writes nothing."""
    root = root_of(path)
    message = one_line_error(main, ["--input", str(path), "--out", str(root / "own"), *options])
    assert not root.exists() or not list(root.iterdir())
    return message


def only_mask(refer: REFER) -> np.ndarray:
    (ref,) = refer.loadRefs()
    mask: np.ndarray = refer.getMask(ref)["mask"]
    assert mask.max(initial=0) <= 1  # pixels above 1 are background in the release
    return mask > 0


# ---- the five kinds of input ----


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> OwnData:
    folder = tmp_path_factory.mktemp("own")
    generate(folder / "shapes", level="medium", seed=5, scenes=6, val_scenes=2, test_scenes=1)
    return OwnData(folder / "shapes", folder)


def test_kinds_of_input_make_the_same_dataset(
    own: OwnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, expressions = own.write_coco()
    images = ["--images", str(own.photos)]
    inputs = {
        "jsonl": [str(own.write_jsonl())],
        "coco": [str(annotations), "--expressions", str(expressions), *images],
        "labelme": [str(own.write_labelme()), *images],
        "masks": [str(own.write_masks())],
    }
    truth = own.masks_by_text()
    splits = {}
    for name, words in inputs.items():
        main(["--input", *words, "--out", str(tmp_path / name)])
        out = capsys.readouterr().out
        assert f"{name}(unc) is sound: 0 of " in out
        refer = REFER(tmp_path, name)
        found = {
            (refer.Imgs[ref["image_id"]]["file_name"], sentence["raw"]): refer.getMask(ref)["mask"]
            for ref in refer.loadRefs()
            for sentence in ref["sentences"]
        }
        assert found.keys() == truth.keys()
        for key, mask in truth.items():
            np.testing.assert_array_equal(found[key] > 0, mask)
        assert len(refer.Refs) == len(own.refs)
        image = refer.image_path(refer.getImgIds()[0])
        assert image.parent == tmp_path / name / "images"
        assert image.samefile(own.photos / image.name)  # a hard link
        splits[name] = {
            refer.Imgs[ref["image_id"]]["file_name"]: ref["split"] for ref in refer.loadRefs()
        }
    assert splits["jsonl"] == splits["coco"] == splits["labelme"] == splits["masks"]
    assert sorted(splits["jsonl"].values()) == ["test"] + ["train"] * 8 + ["val"]


def test_parquet_keeps_ids_and_polygons(own: OwnData, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    source = own.write_parquet()
    (source / "data").mkdir()  # as on the hub
    for file in source.glob("*.parquet"):
        file.rename(source / "data" / file.name)
    images = own.refer.IMAGE_DIR
    main(["--input", str(source), "--out", str(tmp_path / "refcoco"), "--images", str(images)])
    refer = REFER(tmp_path, "refcoco")
    assert refer.Refs == own.refer.Refs
    assert refer.Anns == own.refer.Anns
    assert refer.Imgs == own.refer.Imgs
    assert not (tmp_path / "refcoco" / "images").exists()
    assert refer.loadCats(1) == ["person"]
    main(["--input", str(source), "--out", str(tmp_path / "mine"), "--images", str(images)])
    mine = REFER(tmp_path, "mine")
    assert mine.IMAGE_DIR == mine.DATA_DIR / "images"


def test_parquet_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "in" / "x.parquet"
    file.parent.mkdir()
    file.write_bytes(b"PAR1 not really")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        assert "pip install pyarrow" in error(file)
    pyarrow = pytest.importorskip("pyarrow")
    assert "not a readable parquet" in error(file)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"image": "a"}]), file)
    assert "no column 'sent_ids'" in error(file)
    row: dict[str, Any] = dict.fromkeys(("sent_ids", "file_name", "ann_id", "ref_id"), 1)
    row |= dict.fromkeys(("image_id", "split", "sentences", "category_id"), "1")
    row |= {"raw_anns": "{}", "raw_image_info": "{"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    assert "not as in the copies" in error(file)
    row |= {"sentences": "[]", "raw_anns": '{"id": 1}', "raw_image_info": '{"id": 1}'}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    assert "(KeyError: 'file_name')" in error(file)
    row["raw_image_info"] = '{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}'
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    message = error(file)
    assert f"--input {file}: instances.json" in message
    assert ".convert-" not in message


# ---- what JSON lines may hold ----


@pytest.mark.parametrize(
    "drawn",
    [
        {"mask": "m.png"},
        {"mask": ["m.png"], "value": 1},
        {"segmentation": [SQUARE]},
        {"segmentation": SQUARE},
        {"segmentation": [SQUARE, [4, 4, 8, 4, 8, 8, 4, 8]]},
        {"segmentation": run_lengths(square())},
        {"segmentation": [run_lengths(square())]},
        {"segmentation": {"size": [12, 16], "counts": [26, *[6, 6] * 5, 6, 100]}},
    ],
    ids=["mask", "list", "polygons", "polygon", "overlapping", "text", "list of RLE", "counts"],
)
def test_ways_to_draw(photos: Path, drawn: dict[str, Any]) -> None:
    np.testing.assert_array_equal(only_mask(converted(lines(photos, drawn))), square())


def test_several_objects_and_none(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[0, :3], values[5, 4] = 3, 7
    Image.fromarray(values).save(photos / "v.png")
    Image.new("L", (WIDTH, HEIGHT)).save(photos / "black.png")
    for drawn in (
        {"mask": "black.png"},
        {"mask": "v.png", "value": 9},
        {"segmentation": [[1, 1] * 3]},
    ):
        assert "line 1: " in (message := error(lines(photos, drawn)))
        assert "nothing is drawn in it; null means" in message
    refer = converted(
        lines(
            photos,
            {"mask": ["m.png", "v.png"]},
            {"mask": "v.png", "value": [3, 7], "category": "dots"},
            {"mask": "v.png", "value": 7},
            {"mask": None},
            {"mask": []},
            {"mask": ["m.png", "black.png"]},
        )
    )
    areas = [refer.getMask(ref)["area"] for ref in refer.loadRefs()]
    assert areas == [36 + 4 - 1, 4, 1, 0, 0, 36]
    assert [len(ref["ann_ids"]) for ref in refer.loadRefs()] == [2, 2, 1, 0, 0, 1]
    assert refer.loadCats() == ["dots", "object"]
    assert "1 of 6 references have an object without a pixel" in capsys.readouterr().out


def test_black_on_nothing(photos: Path) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    pixels[..., 3] = 255 * square()
    Image.fromarray(pixels).save(photos / "b.png")
    np.testing.assert_array_equal(only_mask(converted(lines(photos, {"mask": "b.png"}))), square())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "ROOT/a,b"], "a,b: give the data root and a name"),
        (["--splitBy", "a/b"], "--splitBy a/b: use letters"),
    ],
)
def test_names_that_other_commands_cannot_take(
    photos: Path, words: list[str], message: str
) -> None:
    root = str(root_of(photos))
    assert message in error(lines(photos, {}), *(word.replace("ROOT", root) for word in words))


def test_expressions(photos: Path) -> None:
    refer = converted(
        lines(photos, {"expressions": ["  The  RED\nmug\u2028", "Tasse  à café 咖啡"]}), code=0
    )
    sentences = refer.loadRefs()[0]["sentences"]
    assert [s["raw"] for s in sentences] == ["The RED mug", "Tasse à café 咖啡"]
    assert sentences[0]["tokens"] == ["the", "red", "mug"]


def test_file_names(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    names = ["a b.PNG", "ünï/é.JPG", "x/1.png", "y/1.png", "w.webp", "t.tif", "x/y/z.bmp"]
    for name in names:
        write_image(photos / name)
    Image.fromarray(square()).save(photos / "m.png")
    written = [*names[:3], "y\\1.png", "C:\\data\\w.webp", "/home/me/t.tif", "../x/y/z.bmp"]
    refer = converted(lines(photos, *({"image": name} for name in written)))
    for name, image_id in zip(names, refer.getImgIds(), strict=True):
        assert refer.image_path(image_id).samefile(photos / name), name
        assert refer.open_image(image_id).size == (WIDTH, HEIGHT)


# ---- errors ----


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{not json", "is not JSON"),
        ("[1]", "is not an object"),
        ("[" * 100_000, "is not JSON"),
        ({"image": MISSING}, "has no 'image'"),
        ({"image": 5}, "'image' is 5"),
        ({"image": "missing.png"}, "image 'missing.png' does not exist"),
        ({"expressions": MISSING}, "has no 'expressions'"),
        ({"expressions": []}, "has no expression"),
        ({"expressions": ["fine", " "]}, "an expression is empty"),
        ({"expressions": [5]}, "an expression is empty, or is not a text"),
        ({"mask": MISSING}, "has no 'mask' and no 'segmentation'"),
        ({"mask": "n.png"}, "mask 'n.png' does not exist"),
        ({"mask": "a.png"}, "is the image itself"),
        ({"mask": 5}, "'mask' 5 is not a file name"),
        ({"mask": "m.png", "value": "red"}, "'value' 'red'"),
        ({"mask": "lines.jsonl"}, "(lossless)"),
        ({"mask": "m.png", "segmentation": [SQUARE]}, "not both"),
        ({"segmentation": [[1, 2, 300, 2, 5, 5]]}, "leaves the image"),
        ({"segmentation": [[1, 2, 3]]}, "a polygon of 3 numbers"),
        ({"segmentation": [["a", "b", "c", "d"]]}, "not a list of numbers"),
        ({"segmentation": {"counts": [5, 5]}}, "do not fit its 16x12 image"),
        ({"segmentation": {"counts": "~~~"}}, "damaged run lengths"),
        ({"segmentation": 5}, "no polygons"),
        ({"split": "traim"}, "split 'traim' is unknown"),
        ({"split": MISSING}, "has no split, but others have"),
        ({"category": 5}, "'category' is 5"),
    ],
)
def test_a_wrong_line(photos: Path, record: Any, words: str) -> None:
    message = error(lines(photos, {}, "", record))
    assert words in message
    assert "lines.jsonl, line 3" in message


def test_wrong_bytes(photos: Path) -> None:
    path = lines(photos, {})
    text = path.read_bytes()
    path.write_bytes(text + "é\n".encode("latin-1"))
    assert "line 2: is not UTF-8" in error(path)
    path.write_bytes(b"")
    assert "has no expressions" in error(path)
    path.write_bytes(b"\xef\xbb\xbf" + text)
    assert len(converted(path).Refs) == 1


def test_a_mask_of_another_size(photos: Path) -> None:
    Image.new("1", (WIDTH + 1, HEIGHT), 1).save(photos / "wide.png")
    message = error(lines(photos, {"mask": "wide.png"}))
    assert "wide.png of 17x12 pixels" in message
    assert "has 16x12" in message


def test_damaged_files(photos: Path) -> None:
    data = (photos / "m.png").read_bytes()
    (photos / "half.png").write_bytes(data[:-30])
    assert "half.png cannot be read" in error(lines(photos, {"mask": "half.png"}))
    data = (photos / "a.png").read_bytes()
    (photos / "a.png").write_bytes(data[: len(data) // 2])
    assert "a.png cannot be read" in error(lines(photos, {}))


def test_a_jpeg_is_no_mask(photos: Path) -> None:
    Image.fromarray(square()).convert("L").save(photos / "m.jpg")
    assert "(lossless)" in error(lines(photos, {"mask": "m.jpg"}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--split_ratio", "0.8"], "give three numbers"),
        (["--split_ratio", "a,b,c"], "give three numbers"),
        (["--split_ratio", "0.8,0.8,0.8"], "give three numbers"),
        (["--images", "nowhere"], "--images nowhere does not exist"),
        (["--expressions", __file__, "--format", "jsonl"], "goes with COCO annotations"),
        (["--format", "coco"], "goes with COCO annotations"),
        (["--max_pixels", "100"], "--max_pixels 100"),
        (["--max_pixels", "0"], "must be 1 or more"),
    ],
)
def test_wrong_flags(photos: Path, options: list[str], words: str) -> None:
    assert words in error(lines(photos, {}), *options)


def test_wrong_outputs(photos: Path, tmp_path: Path) -> None:
    path = lines(photos, {})
    for out, words in (
        (tmp_path / "data" / "refcoco", "is a published dataset"),
        (path, "cannot write"),
        (path / "own", "cannot make"),
        (Path(), "give the data root and a name"),
    ):
        assert words in one_line_error(main, ["--input", str(path), "--out", str(out)])


def test_unrecognized_input(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "in.txt").write_text("x")
    assert "cannot tell what it is" in error(tmp_path / "in.txt")
    assert "cannot tell what it is" in error(photos)
    (photos / "x.json").write_text("{}")
    assert "cannot tell what it is" in error(photos / "x.json")


# ---- existing files ----


def test_nothing_is_overwritten_without_force(photos: Path) -> None:
    path = lines(photos, {})
    folder = converted(path).DATA_DIR
    before = (folder / "instances.json").read_bytes()
    lines(photos, {"mask": None})
    message = one_line_error(main, ["--input", str(path), "--out", str(folder)])
    assert "--force" in message
    assert (folder / "instances.json").read_bytes() == before
    assert not only_mask(converted(path, "--force")).any()
    (folder / "instances.json").unlink()
    (folder / "refs(unc).p").unlink()
    converted(path)  # the images of an unfinished conversion are no obstacle
    assert sorted(p.name for p in folder.iterdir()) == ["images", "instances.json", "refs(unc).p"]
    assert [p.name for p in folder.parent.iterdir()] == ["own"]


def test_images_of_the_same_name(photos: Path, tmp_path: Path) -> None:
    there = write_image(tmp_path / "data" / "own" / "images" / "a.png", 3)
    path = lines(photos, {})
    out = str(tmp_path / "data" / "own")
    assert "is another image" in one_line_error(main, ["--input", str(path), "--out", out])
    converted(path, "--force")
    assert there.samefile(photos / "a.png")


def test_copies_and_images_in_place(photos: Path, tmp_path: Path) -> None:
    copied = converted(lines(photos, {}), "--copy")
    image = copied.image_path(1)
    assert image.read_bytes() == (photos / "a.png").read_bytes()
    assert not image.samefile(photos / "a.png")
    folder = tmp_path / "data" / "other" / "images"
    photos.rename(tmp_path / "gone")
    folder.parent.mkdir()
    (tmp_path / "gone").rename(folder)
    path = folder.parent / "lines.jsonl"
    (folder / "lines.jsonl").rename(path)
    before = sorted(folder.iterdir())
    main(["--input", str(path), "--images", str(folder), "--out", str(folder.parent)])
    assert sorted(folder.iterdir()) == before


def test_linked_photos_are_no_links_out_of_the_folder(photos: Path, tmp_path: Path) -> None:
    (photos / "link.png").symlink_to(write_image(tmp_path / "elsewhere" / "l.png"))
    refer = converted(lines(photos, {"image": "link.png"}), "--images", str(photos))
    assert not refer.image_path(1).is_symlink()


# ---- EXIF orientation ----


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.webp"])
def test_photos_are_turned_upright(photos: Path, name: str, orientation: int) -> None:
    source = write_image(photos / name, orientation)
    with Image.open(source) as image:
        upright = ImageOps.exif_transpose(image)
    mask = np.zeros((upright.height, upright.width), bool)
    mask[0, :5] = True
    Image.fromarray(mask).save(photos / "u.png")
    refer = converted(lines(photos, {"image": name, "mask": "u.png"}))
    np.testing.assert_array_equal(only_mask(refer), mask)
    written = refer.open_image(1)
    assert written.size == upright.size
    if name == "p.png":
        np.testing.assert_array_equal(np.asarray(written), np.asarray(upright))
    with Image.open(refer.image_path(1)) as image:
        assert not image.getexif()
    with Image.open(source) as image:
        assert image.getexif()[ORIENTATION] == orientation  # the original is as it was


def test_masks_of_stored_pixels(photos: Path) -> None:
    write_image(photos / "p.png", 6)
    path = lines(photos, {"image": "p.png"})
    assert "--exif stored" in error(path)
    refer = converted(path, "--exif", "stored")
    np.testing.assert_array_equal(only_mask(refer), square())
    assert refer.image_path(1).samefile(photos / "p.png")


def test_originals_in_place_are_not_turned(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "own" / "images"
    photo = write_image(folder / "p.png", 3)
    before = photo.read_bytes()
    path = lines(photos, {"image": "p.png"})
    options = ["--images", str(folder), "--out", str(folder.parent), "--force"]
    message = one_line_error(main, ["--input", str(path), *options])
    assert "put the originals in another folder" in message
    assert photo.read_bytes() == before


# ---- masks ----


def test_modes_of_masks(tmp_path: Path) -> None:
    mask = square()
    gray = mask.astype(np.uint8) * 5
    palette = Image.fromarray(mask.astype(np.uint8) * 2, "P")
    palette.putpalette([0, 0, 0, 9, 9, 9, 128, 0, 0])
    reversed_palette = Image.fromarray((~mask).astype(np.uint8), "P")
    reversed_palette.putpalette([255, 255, 255, 0, 0, 0])
    rgb = np.zeros((*mask.shape, 3), np.uint8)
    rgb[mask] = 0, 0, 1
    painted = np.full((*mask.shape, 4), 255, np.uint8)  # white below full transparency
    painted[..., 3] = mask * 200
    opaque = np.dstack([rgb, np.full(mask.shape, 255, np.uint8)])
    images = {
        "1": Image.fromarray(mask),
        "L": Image.fromarray(gray),
        "LA": Image.fromarray(painted).convert("LA"),
        "16": Image.fromarray(gray.astype(np.uint16) * 256),
        "RGB": Image.fromarray(rgb),
        "transparent": Image.fromarray(painted),
        "opaque": Image.fromarray(opaque),
        "P": palette,
        "reversed": reversed_palette,
    }
    for name, image in images.items():
        for ending in ("png", "tif"):
            if ending == "tif" and name == "LA":
                continue
            path = tmp_path / f"{name}.{ending}"
            image.save(path)
            found = read_mask(path, None, 1000, "here")
            np.testing.assert_array_equal(found, mask, err_msg=path.name)
    for name, value in (("P", 2), ("L", 5), ("16", 1280), ("RGB", "#000001"), ("P", "#800000")):
        found = read_mask(tmp_path / f"{name}.png", value, 1000, "here")
        np.testing.assert_array_equal(found, mask)
        assert not read_mask(tmp_path / f"{name}.png", "#123456", 1000, "here").any()


def test_a_number_in_a_color_mask(photos: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(photos / "rgb.png")
    assert "'#rrggbb'" in error(lines(photos, {"mask": "rgb.png", "value": 3}))


def test_masks_elsewhere(photos: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    (photos / "m.png").rename(masks / "m.png")
    path = lines(photos, {"mask": "some/folder/m.png"})
    assert "does not exist" in error(path)
    np.testing.assert_array_equal(only_mask(converted(path, "--masks", str(masks))), square())


# ---- splits ----


def many(photos: Path, count: int) -> Path:
    for number in range(count):
        write_image(photos / f"{number}.png")
    names = [f"{number}.png" for number in range(count) for _ in range(2)]
    return lines(photos, *({"image": name, "split": MISSING} for name in names))


def by_image(refer: REFER) -> dict[str, str]:
    splits: dict[str, set[str]] = {}
    for ref in refer.loadRefs():
        splits.setdefault(refer.Imgs[ref["image_id"]]["file_name"], set()).add(ref["split"])
    assert all(len(names) == 1 for names in splits.values())
    return {name: names.pop() for name, names in splits.items()}


@pytest.mark.parametrize(
    ("ratio", "count", "expected"),
    [
        ("0.8,0.1,0.1", 10, (8, 1, 1)),
        ("0.8,0.1,0.1", 3, (1, 1, 1)),
        ("0.5,0.5,0", 5, (3, 2, 0)),
        ("0,0,1", 4, (0, 0, 4)),
        ("0.9,0.1", 4, (3, 1, 0)),
    ],
)
def test_ratios(photos: Path, ratio: str, count: int, expected: tuple[int, ...]) -> None:
    labels = list(by_image(converted(many(photos, count), "--split_ratio", ratio)).values())
    assert tuple(map(labels.count, ("train", "val", "test"))) == expected


def test_the_seed_divides(photos: Path) -> None:
    path = many(photos, 12)
    first = by_image(converted(path, name="a"))
    assert by_image(converted(path, name="b")) == first
    assert by_image(converted(path, "--seed", "1", name="c")) != first


def test_too_few_images(photos: Path) -> None:
    assert "2 images are too few for 3 splits" in error(many(photos, 2))


def test_given_splits(photos: Path) -> None:
    labels = ["train", "validation", "testA", "testB"]
    refer = converted(lines(photos, *({"split": label} for label in labels)))
    assert [ref["split"] for ref in refer.loadRefs()] == ["train", "val", "testA", "testB"]


# ---- CSV ----


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators(photos: Path, separator: str) -> None:
    rows = [
        ["Image", "mask", "expression ", "split"],
        ["a.png", "m.png", 'a "square", left; yes', "train"],
        [],
        ["a.png", "m.png", "it\nis", "train"],
        ["a.png", "", "nothing", "val"],
    ]
    path = photos / "masks.csv"
    write_csv(path, rows, separator)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    refer = converted(path)
    texts = [[s["raw"] for s in ref["sentences"]] for ref in refer.loadRefs()]
    assert texts == [['a "square", left; yes', "it is"], ["nothing"]]
    assert [len(ref["ann_ids"]) for ref in refer.loadRefs()] == [1, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,mask\na.png,m.png\n", "line 1: no column 'expression'"),
        ("", "line 1: no column 'image'; the header has nothing"),
        ("image,mask,expression\na.png,m.png,left, red\n", "line 2: more fields than the 3"),
        ("image,mask,expression\na.png,m.png\n", "line 2: an expression is empty"),
        ('image,mask,expression\na.png,m.png,"left\n', "line 2: is not CSV"),
        ("image,mask,expression\n,m.png,left\n", "line 2: has no 'image'"),
        (
            "image,mask,expression,split\na.png,m.png,x,train\na.png,m.png,y,val\n",
            "line 3: split 'val', but 'train' in",
        ),
        ("image,mask,expression,value\na.png,m.png,left,1.5\n", "line 2: 'value' '1.5'"),
    ],
)
def test_a_wrong_csv(photos: Path, text: str, words: str) -> None:
    path = photos / "masks.csv"
    path.write_text(text)
    assert words in error(path)


# ---- COCO ----


def coco(photos: Path, expressions: str, name: str = "e.csv") -> list[str]:
    """Writes annotations, of which two have the same id, and gives the flags."""
    size = {"width": WIDTH, "height": HEIGHT}
    tables: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png"} | size, {"id": 2, "file_name": "b.png"} | size],
        "annotations": [
            {"id": 5, "image_id": 1, "segmentation": [SQUARE], "category_id": 3},
            {"id": 5, "image_id": 2, "segmentation": [SQUARE], "category_id": 3},
            {"id": 6, "image_id": 2, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]},
            {"id": 7, "image_id": 2, "bbox": [1, 2, 3, 4]},
        ],
        "categories": [{"id": 3, "name": "square"}],
    }
    (photos / "coco.json").write_text(json.dumps(tables))
    (photos / name).write_text(expressions)
    return ["--expressions", str(photos / name)]


def test_coco_expressions(photos: Path) -> None:
    records = [
        {"ann_id": 5, "image": "a.png", "expression": "one", "split": "train"},
        {"ann_id": [5, 6], "image": "b.png", "expressions": ["two"], "split": "val"},
        {"ann_id": 6, "expressions": ["six"], "split": "val"},
        {"ann_id": "6", "expressions": ["sechs"], "split": "val"},
        {"ann_id": None, "image": "b.png", "expressions": ["none"], "split": "test"},
    ]
    options = coco(photos, "\n".join(map(json.dumps, records)), "e.jsonl")
    refer = converted(photos / "coco.json", *options)
    texts = [[s["raw"] for s in ref["sentences"]] for ref in refer.loadRefs()]
    assert texts == [["one"], ["two"], ["six", "sechs"], ["none"]]
    assert [refer.getMask(ref)["area"] for ref in refer.loadRefs()] == [36, 40, 4, 0]
    categories = [refer.Cats[ref["category_id"]] for ref in refer.loadRefs()]
    assert categories == ["square", "square", "object", "object"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("9,,x", "has 0 annotations 9"),
        ("5,,x", "has 2 annotations 5"),
        ("6,a.png,x", "has 0 annotations 6 in 1 images named 'a.png'"),
        (",,x", "0 images of"),
        ("7,,x", "has no polygons"),
        ("six,,x", "has 0 annotations six"),
    ],
)
def test_wrong_annotations(photos: Path, row: str, words: str) -> None:
    options = coco(photos, f"ann_id,image,expression\n{row}\n")
    message = error(photos / "coco.json", "--split_ratio", "1,0", *options)
    assert words in message
    assert "line 2" in message


def test_coco_of_another_size(photos: Path) -> None:
    options = coco(photos, "ann_id,expression,split\n6,x,train\n")
    Image.new("RGB", (32, 24)).save(photos / "b.png")
    assert "annotations of 16x12 pixels, but the image" in error(photos / "coco.json", *options)


# ---- LabelMe ----


def shape(kind: str, points: list[list[float]], **more: Any) -> dict[str, Any]:
    return {"label": "mug", "shape_type": kind, "points": points, "group_id": None} | more


def labelme(photos: Path, *shapes: Any, **more: Any) -> Path:
    record = {"imagePath": "a.png", "imageWidth": WIDTH, "imageHeight": HEIGHT, "imageData": None}
    path = photos / "x.json"
    path.write_text(json.dumps(record | {"shapes": list(shapes)} | more))
    return path


def test_shapes(photos: Path) -> None:
    labelme(
        photos,
        shape("rectangle", [[8, 8], [2, 2]], description="the red mug\nleft mug"),
        shape("polygon", [[2, 2], [8, 2], [8, 8], [2, 8]]),
        shape("circle", [[0, 0], [3, 4]]),
        shape("rectangle", [[0, 0], [2, 2]], group_id=1),
        shape("rectangle", [[1, 1], [3, 3]], group_id=1, label="handle"),
    )
    refer = converted(photos, "--split_ratio", "1,0")
    drawn = [
        (refer.getMask(ref)["area"], [s["raw"] for s in ref["sentences"]])
        for ref in refer.loadRefs()
    ]
    assert drawn[:2] == [(36, ["the red mug", "left mug"]), (36, ["mug"])]
    assert abs(drawn[2][0] - np.pi * 25 / 4) < 4  # a quarter of the circle is in the image
    assert drawn[3] == (4 + 4 - 1, ["mug", "handle"])
    assert refer.loadCats() == ["mug", "object"]


def test_an_embedded_image(photos: Path) -> None:
    data = (photos / "a.png").read_bytes()
    text = base64.b64encode(data).decode()
    path = labelme(photos, shape("rectangle", [[2, 2], [8, 8]]), imageData=text)
    (photos / "a.png").unlink()
    refer = converted(path, "--split_ratio", "1,0")
    assert refer.image_path(1).read_bytes() == data
    assert refer.image_path(1).name == "a.png"


@pytest.mark.parametrize(
    ("shapes", "more", "words"),
    [
        ([shape("line", [[2, 2], [8, 8]])], {}, "shape 1: is a 'line'"),
        ([shape("polygon", [[2, 2], [8, 8]])], {}, "shape 1: a polygon of 2 points"),
        ([shape("polygon", [[2, 2], [8]])], {}, "are not a list of [x, y]"),
        ([shape("polygon", [[2, 2], [99, 8], [3, 3]])], {}, "leaves the image"),
        ([shape("circle", [[2, 2], [float("nan"), 8]])], {}, "are not a list of [x, y]"),
        ([5], {}, "shape 1: is not an object"),
        ([shape("rectangle", [[2, 2], [8, 8]], label="")], {}, "an expression is empty"),
        ([], {"shapes": None}, "has no list 'shapes'"),
        ([], {}, "has no expressions"),
        ([shape("rectangle", [[2, 2], [8, 8]])], {"imagePath": "z.png"}, "does not exist"),
        ([shape("rectangle", [[2, 2], [8, 8]])], {"imageWidth": 40}, "annotations of 40x12"),
        (
            [shape("rectangle", [[2, 2], [8, 8]])],
            {"imagePath": "z.png", "imageData": "!"},
            "x.json: 'imageData' is damaged",
        ),
    ],
)
def test_wrong_shapes(photos: Path, shapes: list[Any], more: dict[str, Any], words: str) -> None:
    labelme(photos, *shapes, **more)
    assert words in error(photos, "--format", "labelme", "--split_ratio", "1,0")


# ---- what is written ----


def test_damage_ends_with_1(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = check.examine

    def damaged(*args: Any, **options: Any) -> check.Report:
        report = sound(*args, **options)
        report.checks.append(check.Check("x", "x", True, 1, ["it"]))
        return report

    monkeypatch.setattr(check, "examine", damaged)
    converted(lines(photos, {}), code=1)


def test_a_full_disk(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refer.convert.__main__.shutil.copyfile", full)
    argv = ["--input", str(lines(photos, {})), "--out", str(photos.parent / "data" / "own")]
    assert "No space left" in one_line_error(main, [*argv, "--copy"])
    assert not (photos.parent / "data" / "own" / "instances.json").exists()


def test_the_pickle_is_plain(photos: Path) -> None:
    data = (converted(lines(photos, {})).DATA_DIR / "refs(unc).p").read_bytes()
    assert data[:2] == b"\x80\x02"
    assert b"numpy" not in data
    assert b"\nc" not in data
