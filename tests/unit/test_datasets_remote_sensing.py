"""RRSIS-D, RefSegRS and RISBench, read from their published files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bert import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from lib.errors import InputError
from refer import REFER, check
from tests.many_targets import masks, single_targets, write_rrsisd, write_txt
from tests.refer_files import TINY_BERT


def samples(root: Path, name: str, split: str) -> ReferDataset:
    return ReferDataset(REFER(root, name), split, load_tokenizer(TINY_BERT), 56)


def test_rrsisd_masks_are_unions_of_run_lengths(tmp_path: Path) -> None:
    refer = REFER(write_rrsisd(tmp_path), "rrsisd")
    assert refer.splits() == ["train", "val", "test"]
    assert tmp_path / "images/rrsisd/JPEGImages" == refer.IMAGE_DIR
    drawn = masks()
    val = ReferDataset(refer, "val", load_tokenizer(TINY_BERT), 56)
    val.check_images()
    assert len(val) == 3
    for i, record in enumerate(val.records):
        np.testing.assert_array_equal(val.mask(i), drawn[record.ann_ids[0]])
    given = REFER(tmp_path, "rrsisd", image_root=tmp_path / "images/rrsisd")
    assert tmp_path / "images/rrsisd/JPEGImages" == given.IMAGE_DIR


@pytest.mark.parametrize("name", ["refsegrs", "risbench"])
def test_txt_layout(name: str, tmp_path: Path) -> None:
    refer = REFER(write_txt(tmp_path, name), name)
    assert refer.splitBy == "official"
    assert refer.splits() == ["train", "val", "test"]
    drawn, texts = masks(), {ann: text for ann, _, text in single_targets()}
    seen = []
    for split in refer.splits():
        data = samples(tmp_path, name, split)
        data.check_images()
        for i, record in enumerate(data.records):
            ann = int(Path(record.file_name).stem)
            seen.append(ann)
            assert record.expression == texts[ann]
            np.testing.assert_array_equal(data.mask(i), drawn[ann])
            assert data.original_image(i).size == drawn[ann].shape[::-1]
    assert sorted(seen) == sorted(texts)
    ref = refer.loadRefs(1)[0]
    assert refer.getMask(ref)["area"] == drawn[1].sum()


@pytest.mark.parametrize("name", ["rrsisd", "refsegrs"])
def test_check(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rrsisd(tmp_path) if name == "rrsisd" else write_txt(tmp_path)
    check.main(["--refer_data_root", str(tmp_path), "--dataset", name, "--images"])
    printed = capsys.readouterr().out
    assert "is sound" in printed
    assert {"rrsisd": "17402", "refsegrs": "4420"}[name] in printed
    assert "count as background" not in printed


def test_several_lines_of_one_name_are_one_object(tmp_path: Path) -> None:
    root = write_txt(tmp_path)
    path = root / "refsegrs/output_phrase_train.txt"
    path.write_text("1.tif  the   road \n1 the way\n", encoding="utf-8")
    refs = [r for r in REFER(root, "refsegrs").loadRefs() if r["split"] == "train"]
    assert [r["sentences"][0]["raw"] for r in refs] == ["the road", "the way"]
    assert len({r["ref_id"] for r in refs}) == 2
    assert len({tuple(r["ann_ids"]) for r in refs}) == 1


def test_damaged_txt_layouts(tmp_path: Path) -> None:
    root = write_txt(tmp_path)
    folder = root / "refsegrs"
    val = folder / "output_phrase_val.txt"
    kept = val.read_text()
    val.write_text("no/../such words\n")
    with pytest.raises(
        InputError, match=r"val\.txt, line 1: .* no mask of the name 'no/\.\./such'"
    ):
        REFER(root, "refsegrs")
    val.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"output_phrase_val\.txt: cannot be read"):
        REFER(root, "refsegrs")
    val.write_text(kept)
    Image.new("L", (4, 4)).save(folder / "masks/5.tif")
    data = samples(root, "refsegrs", "val")  # the mask's size is that on record
    with pytest.raises(InputError, match=r"image .* has 451x300 pixels"):
        data.image(0)
    (folder / "masks/5.tif").write_bytes(b"II*\0")
    with pytest.raises(InputError, match=r"mask .*5\.tif cannot be read"):
        REFER(root, "refsegrs")
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(InputError, match="has none of output_phrase_train"):
        REFER(root, "refsegrs")


def test_a_mask_changed_after_the_start_is_an_error(tmp_path: Path) -> None:
    data = samples(write_txt(tmp_path), "refsegrs", "val")
    Image.new("L", (4, 4)).save(tmp_path / "refsegrs/masks/5.tif")
    with pytest.raises(InputError, match="has 4x4 pixels, not 451x300"):
        data.mask(0)


def test_a_path_is_no_segmentation_of_other_datasets(tmp_path: Path) -> None:
    """Only the txt layouts open files that are named by a segmentation."""
    root = write_rrsisd(tmp_path)
    path = root / "rrsisd/instances.json"
    path.write_text(
        path.read_text().replace('"segmentation": [', '"segmentation": "x.png", "s": [')
    )
    with pytest.raises(InputError, match="has no polygons"):
        samples(root, "rrsisd", "val").mask(0)
