"""RefCOCO-M, read from its parquet files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from bert import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from lib.errors import InputError
from refer import REFER, check, refcoco_m
from tests.many_targets import CC0_IMAGES, masks, single_targets, write_refcoco_m
from tests.refer_files import TINY_BERT


def test_without_pyarrow_one_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "refcoco-m").mkdir()
    with pytest.raises(InputError, match=r"has no \.parquet file"):
        REFER(tmp_path, "refcoco-m")
    (tmp_path / "refcoco-m/a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        REFER(tmp_path, "refcoco-m")


def test_damaged_files(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "refcoco-m").mkdir()
    path = tmp_path / "refcoco-m/a.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read"):
        REFER(tmp_path, "refcoco-m")
    parquet.write_table(pa.table({"image_id": [1]}), path)
    with pytest.raises(InputError, match="has no column 'file_name'"):
        REFER(tmp_path, "refcoco-m")
    columns = {"image_id": [1], "file_name": ["a.jpg"], "samples": [[{"id": 1}]]}
    parquet.write_table(pa.table(columns), path)
    with pytest.raises(InputError, match="not a row of RefCOCO-M"):
        REFER(tmp_path, "refcoco-m")


def test_masks_expressions_and_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    write_refcoco_m(tmp_path)
    refcoco_m.main(["--refer_data_root", str(tmp_path)])
    assert "written: 4 images" in capsys.readouterr().out
    refer = REFER(tmp_path, "refcoco-m")
    assert refer.splits() == ["val"]
    with pytest.raises(InputError, match="has no split 'train'; choose from val"):
        ReferDataset(refer, "train", load_tokenizer(TINY_BERT), 56)
    data = ReferDataset(refer, "val", load_tokenizer(TINY_BERT), 56)
    data.check_images()
    drawn = masks()
    assert len(data) == 2 * len(drawn)
    for i, (ann, image, text) in enumerate(single_targets()):
        for k, words in enumerate((text, text.upper())):
            record = data.records[2 * i + k]
            assert (record.expression, record.image_id) == (words, image)
            np.testing.assert_array_equal(data.mask(2 * i + k), drawn[ann])
    for path in CC0_IMAGES.iterdir():  # the very bytes
        assert (tmp_path / "images/refcoco-m" / path.name).read_bytes() == path.read_bytes()
    check.main(["--refer_data_root", str(tmp_path), "--dataset", "refcoco-m"])
    assert "is sound" in capsys.readouterr().out
