"""Writing checkpoints whole, and reading them with care."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from lib import checkpoint
from lib.checkpoint import load_model, load_training, read_checkpoint, write_checkpoint
from lib.checkpoint.mismatch import describe
from lib.errors import InputError
from lib.lavt import LAVT
from lib.training import optim
from lib.training.steps import _update
from tests.conftest import Build


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.pth"
    content = {"model": {"w": torch.randn(3)}, "epoch": 2, "args": {"lr": 1e-4, "names": ["a"]}}
    write_checkpoint(content, path)
    result = read_checkpoint(path)
    assert torch.equal(result["model"]["w"], content["model"]["w"])  # type: ignore[index]
    assert (result["epoch"], result["args"]) == (2, content["args"])
    assert [p.name for p in path.parent.iterdir()] == ["a.pth"]
    assert len(checkpoint.file_hash(path)) == 64


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("zip")])
def test_failed_write_leaves_the_old_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"
    write_checkpoint({"epoch": 1}, path)

    def full_disk(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match=r"cannot write .*a\.pth"):
        write_checkpoint({"epoch": 2}, path)
    assert read_checkpoint(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"
    write_checkpoint({"epoch": 1}, path)

    def killed(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({"epoch": 2}, path)
    assert read_checkpoint(path) == {"epoch": 1}


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_file(part: float, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    content = {"model": {"w": torch.randn(50, 50)}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(InputError, match=r"a\.pth is damaged or no PyTorch checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04nonsense", b"\x80\x02K\x01.", b"{}"])
def test_what_is_no_checkpoint(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.pth") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_missing_file_folder_and_other_content(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(InputError, match="no checkpoint at"):
            read_checkpoint(path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pth")
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="damaged or no safetensors"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"epoch": 1},
        {"model": None},
        {"model": {}},
        {"model": {"w": 1.0}},
        {"model": {1: torch.zeros(1)}},
        {"model": {"backbone.w": torch.zeros(1)}, "bert_model": None},
        {"model": {"backbone.w": torch.zeros(1)}, "bert_model": [1]},
    ],
)
def test_file_without_weights(content: dict[str, Any], build_nano: Build) -> None:
    with pytest.raises(InputError, match=r"a\.pth holds no model weights"):
        load_model(build_nano(), content, "a.pth")


def test_file_without_text_encoder(build_nano: Build) -> None:
    model = build_nano()
    content = {"model": model.to_published()["model"]}
    with pytest.raises(InputError, match="holds no text encoder"):
        load_model(model, content, "a.pth")


@pytest.mark.parametrize(
    ("held", "hint"),
    [
        ({"window_size": 12}, "it would fit: --window12"),
        ({"swin_type": "micro"}, "it would fit: --swin_type micro"),
        ({"swin_type": "micro", "window_size": 12}, "fit: --swin_type micro --window12"),
        ({"ape_grid": 4}, "it would fit: --ape 4"),
        ({"text": {"hidden_size": 64}}, "--ck_bert and --bert_tokenizer with text width 64"),
        ({"text": {"num_hidden_layers": 3}}, "with text layers 3"),
        ({"text": {"vocab_size": 70}}, "with vocabulary 70"),
    ],
)
def test_a_file_of_another_model_names_the_options(
    held: dict[str, Any], hint: str, build_nano: Build, text_config: BertConfig
) -> None:
    options = {k: v for k, v in held.items() if k != "text"}
    config = BertConfig(**{**text_config.to_dict(), **held.get("text", {})})
    content = dict(build_nano(text_config=config, **options).to_published())
    model = build_nano()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=re.escape(hint)):
        load_model(model, content, "a.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_window_7_file_into_a_window_12_model(build_nano: Build) -> None:
    content = dict(build_nano().to_published())
    with pytest.raises(InputError, match=r"window 7 \(no --window12\)"):
        load_model(build_nano(window_size=12), content, "a.pth")


def test_a_size_nobody_knows(build_nano: Build) -> None:
    content = dict(build_nano().to_published())
    content["model"] = {k: v for k, v in content["model"].items() if ".blocks.1." not in k}
    with pytest.raises(InputError, match=r"weights missing, like backbone\.layers\.0\.blocks\.1"):
        load_model(build_nano(), content, "a.pth")


def test_a_weight_too_many_too_few_or_misshapen_is_named(build_nano: Build) -> None:
    def content(**changes: Any) -> dict[str, Any]:
        state = build_nano("lavt_one").to_published()["model"]
        return {k: v for k, v in (state | changes).items() if v is not None}

    key = "classifier.bn1_4.weight"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({key: None}, f"1 weights missing, like {key}"),
        ({"backbone.new": torch.zeros(1)}, "1 weights unknown, like backbone.new"),
        ({key: torch.zeros(3)}, f"1 weights of another shape, like {key}"),
    ]
    for changes, message in wrong:
        with pytest.raises(InputError, match=re.escape(message)):
            load_model(build_nano("lavt_one"), content(**changes), "a.pth")


@pytest.mark.parametrize(
    ("old", "new"),
    [("fusion", "pwam"), ("backbone.layers", "backbone.stages"), ("text_encoder", "language")],
)
def test_other_names_are_quoted(old: str, new: str, build_nano: Build) -> None:
    """And no flag is guessed from them."""
    state = build_nano("lavt_one", ape_grid=4).to_published()["model"]
    renamed = {k.replace(old, new): v for k, v in state.items()}
    with pytest.raises(InputError, match=rf"other names.*{new}.* where .*{old}") as caught:
        load_model(build_nano("lavt_one", ape_grid=4), {"model": renamed}, "a.pth")
    assert "--" not in str(caught.value)


def test_describe(build_nano: Build) -> None:
    assert describe(build_nano(ape_grid=5, window_size=12).state_dict()) == {
        "model": "lavt",
        "swin_type": "nano",
        "window": 12,
        "ape": 5,
        "no_target_head": False,
        "text_width": 32,
        "text_layers": 2,
        "vocabulary": 60,
    }


def training(model: LAVT, lang_layers: int = 10) -> tuple[Any, Any]:
    groups = optim.parameter_groups(model, 0.1, lang_layers)
    optimizer = optim.build_optimizer(groups, 1e-3)
    return optimizer, optim.poly_schedule(optimizer, 10)


def test_training_state_is_continued(tmp_path: Path, build_nano: Build) -> None:
    model = build_nano()
    optimizer, scheduler = training(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    scheduler.step()
    state = {"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}
    write_checkpoint({**state, "epoch": 0}, tmp_path / "a.pth")

    content = read_checkpoint(tmp_path / "a.pth")
    again, schedule = training(model)
    load_training(content, "a.pth", again, schedule)
    assert schedule.last_epoch == 1
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for p in again.param_groups[0]["params"]:
        assert torch.equal(again.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])


def test_the_release_s_optimizer_state_trains_on(build_nano: Build) -> None:
    """It is not fused, and older torch versions counted steps in ints."""
    model = build_nano()
    optimizer, scheduler = training(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for key in ("fused", "foreach", "capturable", "differentiable", "decoupled_weight_decay"):
            group.pop(key, None)
    for moments in state["state"].values():
        moments["step"] = 1
    content = {"optimizer": state, "lr_scheduler": scheduler.state_dict(), "epoch": 0}
    again, schedule = training(model)
    load_training(content, "a.pth", again, schedule)
    before = parameters[0].clone()
    _update(again, torch.amp.GradScaler("cpu", enabled=False), torch.tensor(True))
    assert not torch.equal(parameters[0], before)
    assert again.state[parameters[0]]["step"] == 2


@pytest.mark.parametrize("key", ["optimizer", "lr_scheduler", "epoch"])
def test_weights_alone_cannot_be_resumed(key: str, build_nano: Build) -> None:
    optimizer, scheduler = training(build_nano())
    content = {
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 0,
    }
    del content[key]
    with pytest.raises(InputError, match=f"holds no {key}: it can be tested, not resumed"):
        load_training(content, "a.pth", optimizer, scheduler)


def test_resuming_with_other_groups(build_nano: Build) -> None:
    model = build_nano()
    optimizer, scheduler = training(model, lang_layers=1)
    content = {
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 0,
    }
    with pytest.raises(InputError, match="resume with the flags"):
        load_training(content, "a.pth", *training(model))
    with pytest.raises(InputError, match="resume with the flags"):
        load_training(content | {"optimizer": [1]}, "a.pth", *training(model))
