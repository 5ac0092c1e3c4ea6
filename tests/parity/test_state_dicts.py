"""Names, shapes and order of the state dicts, and every layout in which weights are published."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bert import config_values
from lib import checkpoint
from lib.checkpoint import load_model, read_checkpoint
from lib.checkpoint.layouts import flat_state
from lib.errors import InputError
from lib.training import optim
from lib.training.trainer import Trainer
from tests.conftest import Build
from tests.parity import checks, golden
from utils import DistInfo

State = dict[str, Tensor]


def test_keys_shapes_dtypes_and_order() -> None:
    checks.require(checks.keys_rows())


@pytest.mark.parametrize("window", [7, 12])
@pytest.mark.parametrize(
    ("other", "measured", "file"),
    [("small", "base", "keys_lavt_base_w12.json"), ("large", "base", "keys_lavt_base_w12.json")],
)
def test_sizes_that_were_not_measured(other: str, measured: str, file: str, window: int) -> None:
    """Small is base at 3/4 of its width, large at 3/2; names and order are the same."""
    ratio = {"small": 0.75, "large": 1.5}[other]
    state = checks.meta_model("lavt", other, window).to_published()["model"]
    expected = golden.read_json(file)
    assert list(state) == [name for name, _, _ in expected]
    table, index = [(2 * window - 1) ** 2], [window**2] * 2
    for name, shape, dtype in expected:
        value = state[name]
        assert str(value.dtype) == f"torch.{dtype}"
        if name.endswith("relative_position_index"):
            assert list(value.shape) == index
        elif name.endswith("relative_position_bias_table"):
            assert list(value.shape) == [*table, shape[1] * ratio]
        elif name == "classifier.conv1_1.bias":
            assert list(value.shape) == [2]
        else:
            words = ".f_key." in name or ".f_value." in name
            fixed = {"conv1_1.weight": (0,), "patch_embed.proj.weight": (1,)}
            kept = next((axes for end, axes in fixed.items() if name.endswith(end)), ())
            axes = [
                n if axis > 1 or axis in kept or (words and axis == 1) else n * ratio
                for axis, n in enumerate(shape)
            ]
            assert list(value.shape) == axes, name


@pytest.mark.parametrize("swin", ["tiny", "small", "base", "large"])
def test_lavt_one_is_lavt_with_the_text_encoder_inside(swin: str) -> None:
    one = checks.meta_model("lavt_one", swin, 12).to_published()["model"]
    two = checks.meta_model("lavt", swin, 12).to_published()
    inside = {f"text_encoder.{k}": v for k, v in two["bert_model"].items()}
    assert checks.layout(one) == checks.layout(two["model"] | inside)


def meta_state(file: str) -> State:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, shape, dtype in golden.read_json(file)
    }


def test_published_key_lists_load_strictly() -> None:
    text = meta_state("keys_bert_vendored_full.json")  # with the pooler
    text["embeddings.position_ids"] = torch.empty((1, 512), dtype=torch.int64, device="meta")
    lavt = {"model": meta_state("keys_lavt_tiny_w7.json"), "bert_model": text}
    model = checks.meta_model("lavt", "tiny", 7)
    load_model(model, lavt, "lavt.pth")
    loaded = model.from_published(flat_state(lavt, "lavt.pth"))
    assert loaded.keys() == model.state_dict().keys()

    one = {"model": meta_state("keys_lavt_one_base_w12.json")}
    load_model(checks.meta_model("lavt_one", "base", 12), one, "lavt_one.pth")
    del one["model"]["classifier.bn1_4.weight"]
    with pytest.raises(InputError, match=r"1 weights missing.*classifier\.bn1_4\.weight"):
        load_model(checks.meta_model("lavt_one", "base", 12), one, "lavt_one.pth")


def prefixed(state: State, prefix: str = "module.") -> State:
    return {prefix + k: v for k, v in state.items()}


def with_leftovers(text: State) -> State:
    return text | {
        "embeddings.position_ids": torch.arange(24)[None],
        "pooler.dense.weight": torch.zeros(32, 32),
        "pooler.dense.bias": torch.zeros(32),
    }


def namespace_args(content: dict[str, Any]) -> dict[str, Any]:
    return content | {"args": argparse.Namespace(lr=5e-5, mha="", window12=True), "epoch": 39}


def ddp(content: dict[str, Any]) -> dict[str, Any]:
    return {k: prefixed(v) for k, v in content.items()}


def pooler(content: dict[str, Any]) -> dict[str, Any]:
    return content | {"bert_model": with_leftovers(content["bert_model"])}


def pooler_inside(content: dict[str, Any]) -> dict[str, Any]:
    leftovers = prefixed(with_leftovers({}), "text_encoder.")
    return {"model": content["model"] | leftovers}


def bare(content: dict[str, Any]) -> dict[str, Any]:
    return dict(content["model"])


LAYOUTS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "lavt": ("lavt", dict),
    "lavt, Namespace": ("lavt", namespace_args),
    "lavt, pooler and position_ids": ("lavt", pooler),
    "lavt, DDP prefixes": ("lavt", ddp),
    "lavt, DDP prefixes, pooler": ("lavt", lambda c: ddp(pooler(c))),
    "lavt_one": ("lavt_one", dict),
    "lavt_one, Namespace": ("lavt_one", namespace_args),
    "lavt_one, pooler and position_ids": ("lavt_one", pooler_inside),
    "lavt_one, DDP prefixes": ("lavt_one", ddp),
    "lavt_one, bare": ("lavt_one", bare),
    "lavt_one, bare, DDP prefixes": ("lavt_one", lambda c: prefixed(bare(c))),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, zipped: bool, tmp_path: Path, build_nano: Build) -> None:
    name, arrange = LAYOUTS[layout]
    source = build_nano(name)
    path = tmp_path / "published.pth"
    content = arrange(dict(source.to_published()))
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for target_name in ("lavt", "lavt_one"):  # the same network: each reads the other's file
        target = build_nano(target_name)
        load_model(target, read_checkpoint(path), path)
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["lavt", "lavt_one"])
def test_what_train_py_saves_is_what_the_release_reads(
    name: str, tmp_path: Path, build_nano: Build
) -> None:
    model = build_nano(name)
    groups = optim.parameter_groups(model, 1e-2)
    optimizer = optim.build_optimizer(groups, 5e-5)
    # Only the state is used, so most of a trainer is left out.
    trainer = Trainer.__new__(Trainer)
    trainer.model = trainer.evaluated = model
    trainer.average, trainer.optimizer = None, optimizer
    trainer.scheduler = optim.poly_schedule(optimizer, 10)
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=False)
    trainer.info = DistInfo(0, 1, torch.device("cpu"))
    trainer.arguments = {"model": name, "lr": 5e-5, "mha": "", "splits": ["val"]}
    trainer.epoch, trainer.step, trainer.steps, trainer.skipped = 4, 0, 5, 0
    trainer.loss_sum, trainer.loss_count, trainer.recent = 0.0, 0, []
    trainer.best_oIoU = 50.0
    trainer.bert = {"config": config_values(model.text_config), "tokenizer": None}
    trainer.seen_images = {"COCO": torch.tensor([9])}
    path = tmp_path / "model_best.pth"
    checkpoint.write_checkpoint(trainer.state_dict([trainer.get_rank_state()]), path)

    content = torch.load(path, weights_only=True)  # today's default, with no allow-list
    release = {"model", "optimizer", "epoch", "args", "lr_scheduler"}
    assert content.keys() >= release | ({"bert_model"} if name == "lavt" else set())
    published = model.to_published()
    assert "bert_model" in content or name == "lavt_one"
    for entry, state in published.items():
        assert list(content[entry]) == list(state)
        assert all(isinstance(v, Tensor) for v in content[entry].values())
        assert not any(k.startswith("module.") for k in content[entry])
    assert len(content["optimizer"]["param_groups"]) == 4
    assert content["epoch"] == 3


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_hostile_file_is_refused_and_does_nothing(zipped: bool, tmp_path: Path) -> None:
    trace = tmp_path / "it_ran"
    path = tmp_path / "hostile.pth"
    content = {"model": {"w": torch.zeros(1)}, "args": Hostile(f"touch {trace}")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="more than tensors and plain values"):
        read_checkpoint(path)
    assert not trace.exists()
