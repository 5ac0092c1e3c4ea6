"""Images named otherwise than their files: found where that is certain, and inside their folder."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from lib.errors import InputError
from refer import REFER
from refer.names import Finder
from tests.refer_files import default_instances, write_root

COCO = "COCO_train2014_000000000101.jpg"


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a b.jpg", "a b.jpg"),
        ("./x.jpg", "x.jpg"),
        ("train2014/x.jpg", "x.jpg"),
        ("images/train2014/x.jpg", "x.jpg"),
        ("images/train2014/x.jpg", "train2014/x.jpg"),
        ("train2014\\x.jpg", "x.jpg"),
        ("part\\x.jpg", "part/x.jpg"),
        ("part\\x.jpg", "part\\x.jpg"),
        ("part/x.jpg", "part/x.jpg"),
        ("a:b.jpg", "a:b.jpg"),
        ("C:\\data\\train2014\\x.jpg", "x.jpg"),
        ("d:x.jpg", "x.jpg"),
        ("\\\\server\\share\\x.jpg", "x.jpg"),
        ("/home/x/x.jpg", "x.jpg"),
        ("http://images.cocodataset.org/train2014/x.jpg", "x.jpg"),
        ("x.JPG", "x.jpg"),
        ("x.jpg", "x.JPEG"),
        ("x.Jpeg", "x.jpG"),
        ("x.PNG", "x.png"),
        ("000000000101.jpg", COCO),
        ("train2017/000000000101.jpg", COCO),
        (COCO, "000000000101.jpg"),
        (COCO.replace("train", "val"), COCO),
        (unicodedata.normalize("NFC", "é ü.jpg"), unicodedata.normalize("NFD", "é ü.jpg")),
        (unicodedata.normalize("NFD", "é ü.jpg"), unicodedata.normalize("NFC", "é ü.jpg")),
        ("x/é.JPG", unicodedata.normalize("NFD", "x/é.jpg")),
    ],
)
def test_found(tmp_path: Path, name: str, file: str) -> None:
    folder_with(tmp_path, file, "other.jpg")
    assert Finder(tmp_path, [name, "other.jpg"]).find(name) == tmp_path / file


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("x.jpg", "y.jpg"),
        ("x.jpg", "X.jpg"),
        ("x.jpg", "x.png"),
        ("x.jpg", "sub/x.jpg"),
        ("000000000101.jpg", "COCO_train2014_000000000102.jpg"),
        ("101.jpg", COCO),
        ("../x.jpg", "x.jpg"),
        ("a/../x.jpg", "x.jpg"),
        ("..\\x.jpg", "x.jpg"),
        ("x.jpg\0", "x.jpg"),
        ("", "x.jpg"),
        ("/", "x.jpg"),
        ("\ud800/x.jpg", "x.jpg"),
        ("a" * 5000, "x.jpg"),
        ("a/" * 100_000, "x.jpg"),
    ],
)
def test_not_found(tmp_path: Path, name: str, file: str) -> None:
    finder = Finder(folder_with(tmp_path, file), [name])
    assert finder.find(name) is None
    assert finder.tried(name)


def test_the_name_as_written_wins(tmp_path: Path) -> None:
    folder_with(tmp_path, "train2014/x.jpg", "x.jpg", "x.JPG")
    names = ["train2014/x.jpg", "x.jpg", "x.JPG"]
    finder = Finder(tmp_path, names)
    assert [finder.find(name) for name in names] == [tmp_path / name for name in names]


def test_several_images_of_one_base_name(tmp_path: Path) -> None:
    finder = Finder(folder_with(tmp_path, "x.jpg", "c/x.jpg"), ["a/x.jpg", "b/x.jpg", "d/c/x.jpg"])
    assert finder.find("a/x.jpg") is finder.find("b/x.jpg") is None
    assert finder.find("d/c/x.jpg") == tmp_path / "c" / "x.jpg"
    assert "several images are named x.jpg" in finder.tried("a/x.jpg")
    # Two records of one file are no reason for doubt.
    assert Finder(tmp_path, ["a/x.jpg", "a\\x.jpg", "./a/x.jpg"]).find("a/x.jpg")


def test_several_files_that_could_be_meant(tmp_path: Path) -> None:
    finder = Finder(folder_with(tmp_path, "x.JPG", "x.jpeg"), ["x.jpg"])
    assert finder.find("x.jpg") is None


def refer_with(root: Path, name: str) -> REFER:
    instances = default_instances()
    instances["images"][0]["file_name"] = name
    return REFER(write_root(root, instances=instances))


@pytest.mark.parametrize("name", [f"C:\\data\\{COCO}", f"/home/x/{COCO}", "train/000000000101.JPG"])
@pytest.mark.parametrize("arrays", [False, True])
def test_the_reader_finds_them(tmp_path: Path, name: str, arrays: bool) -> None:
    refer = refer_with(tmp_path, name)
    if arrays:
        assert len(refer.arrays.raw) == 7
    assert refer.image_path(101) == refer.IMAGE_DIR / COCO
    assert refer.open_image(101).size == (16, 12)
    assert refer.__dict__.keys().isdisjoint({"Imgs"} if arrays else ())


def test_an_absolute_name_in_the_folder(tmp_path: Path) -> None:
    folder_with(tmp_path, "a/x.jpg", "b/x.jpg")
    names = [str(tmp_path / "a/x.jpg"), str(tmp_path / "b/x.jpg")]
    finder = Finder(tmp_path, names)
    assert [str(finder.path(name, "here")) for name in names] == names


@pytest.mark.parametrize("name", ["/etc/passwd", "C:\\x\\y.jpg"])
def test_absolute_names_do_not_lead_out(tmp_path: Path, name: str) -> None:
    refer = refer_with(tmp_path, name)
    with pytest.raises(InputError, match=r"leads out of the image folder /.*; tried "):
        refer.open_image(101)


def test_links_found_under_another_name_stay_inside(tmp_path: Path) -> None:
    refer = refer_with(tmp_path, "/home/x/secret.JPG")
    Image.new("L", (16, 12)).save(tmp_path / "outside.jpg")
    (refer.IMAGE_DIR / "secret.jpg").symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(InputError, match="is a link out of the image folder"):
        refer.open_image(101)


def test_a_missing_image_says_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist; tried a/x\.jpg and x\.jpg, also with"):
        refer_with(tmp_path, "a/x.jpg").open_image(101)
