"""Train, resume, test: the scripts as a user starts them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import demo_inference as demo_script
import test as test_script
import train as train_script
from args import parse_train
from lib.evaluation.metrics import PRECISION_AT
from tests.scripts import Shapes, jsonl, run


@pytest.fixture(scope="module")
def trained(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where two epochs were trained without interruption."""
    cwd = tmp_path_factory.mktemp("trained")
    done = run(cwd, "train.py", *shapes.train_options, "--epochs", "2", "--model_id", "whole")
    assert done.returncode == 0, done.stderr
    return cwd


def test_training_leaves_what_it_promises(trained: Path) -> None:
    folder = trained / "models" / "whole"
    logged = (folder / "log.txt").read_text().splitlines()
    numbers = [line for line in logged if "oIoU" in line]
    assert len(numbers) >= 2
    assert all(line.endswith(" [val_expressions=one img_size=56]") for line in numbers)
    assert json.loads((folder / "args.json").read_text())["model_id"] == "whole"
    records = jsonl(folder / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert [r["epoch"] for r in epochs] == [0, 1]
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert all(0 <= e["val"]["oIoU"] <= 100 for e in epochs)
    best = max(e["val"]["oIoU"] for e in epochs)
    for which in ("best", "last"):
        path = trained / "checkpoints" / f"model_{which}_whole.pth"
        content = torch.load(path, weights_only=True)
        assert set(content) >= {"model", "bert_model", "optimizer", "lr_scheduler", "epoch", "args"}
        assert content["best_oIoU"] == best
    assert content["epoch"] == 1


def test_resumed_run_equals_the_uninterrupted_one(
    trained: Path, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same samples, same expressions, same dropout: same weights, to the bit."""
    options = [*shapes.train_options, "--epochs", "2", "--model_id", "parts"]
    first = run(tmp_path, "train.py", *options, "--stop_after", "1")
    assert first.returncode == 0, first.stderr
    last = tmp_path / "checkpoints" / "model_last_parts.pth"
    second = run(tmp_path, "train.py", *options, "--resume", str(last))
    assert second.returncode == 0, second.stderr
    whole = torch.load(trained / "checkpoints" / "model_last_whole.pth", weights_only=True)
    parts = torch.load(last, weights_only=True)
    for key in ("model", "bert_model"):
        for name, value in whole[key].items():
            assert torch.equal(value, parts[key][name]), name
    assert whole["lr_scheduler"] == parts["lr_scheduler"]
    assert whole["best_oIoU"] == parts["best_oIoU"]
    losses = [
        [r["loss"] for r in jsonl(folder / "metrics.jsonl") if r["kind"] == "step"]
        for folder in (trained / "models" / "whole", tmp_path / "models" / "parts")
    ]
    assert losses[0] == losses[1]


def test_evaluation_prints_and_writes_the_metrics(trained: Path, shapes: Shapes) -> None:
    done = run(
        trained,
        "test.py",
        *shapes.options,
        *("--resume", "checkpoints/model_best_whole.pth", "--split", "val,testA", "--control"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Final results:\nMean IoU is ") == 2
    written = json.loads((trained / "models/lavt/results_refcoco_unc_val_testA.json").read_text())
    assert set(written["splits"]) == {"val", "testA"}
    val = written["splits"]["val"]
    assert set(val["all"]["precision"]) == {str(k) for k in PRECISION_AT}
    assert f"    overall IoU = {val['all']['oIoU']:.2f}" in done.stdout
    assert any(name.startswith("kind: ") for name in val)
    assert val["same, sentence of another object"]["samples"] > 0
    kinds = [m["samples"] for name, m in val.items() if name.startswith("kind: ")]
    assert sum(kinds) == val["all"]["samples"]
    assert len(written["checkpoint"]["sha256"]) == 64


def test_batch_size_and_workers_do_not_change_counts(
    trained: Path, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = str(trained / "checkpoints" / "model_best_whole.pth")
    result = []
    for i, extra in enumerate((["-b", "1"], ["-b", "5"], ["-b", "5", "-j", "2"])):
        out = tmp_path / f"{i}.json"
        test_script.main(
            [
                *shapes.options,
                *extra,
                "--resume",
                checkpoint,
                "--split",
                "val",
                "--results",
                str(out),
            ]
        )
        result.append(json.loads(out.read_text())["splits"]["val"]["all"])
    assert result[0] == result[1] == result[2]


@pytest.mark.parametrize("model", ["lavt_one", "crossvlt"])
def test_other_models_walk_the_same_road(
    model: str, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, resume and test; one dictionary in the checkpoint."""
    monkeypatch.chdir(tmp_path)
    options = [*shapes.train_options, "--model", model, "--epochs", "2"]
    train_script.main([*options, "--stop_after", "1"])
    last = "checkpoints/model_last_lavt.pth"
    train_script.main([*options, "--resume", last])
    content = torch.load(last, weights_only=True)
    assert "bert_model" not in content
    assert content["epoch"] == 1
    words = "text_encoder." if model == "lavt_one" else "lang_stage1."
    assert any(name.startswith(words) for name in content["model"])
    test_script.main(
        [
            *(*shapes.options, "--model", model, "--resume", last),
            *("--split", "testB", "--results", "r.json"),
        ]
    )
    assert json.loads(Path("r.json").read_text())["splits"]["testB"]["all"]["samples"] > 0


def test_published_crossvlt_weights_load(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare state dict without ``temp``, as its authors publish it."""
    monkeypatch.chdir(tmp_path)
    options = [*shapes.train_options, "--model", "crossvlt", "--epochs", "1"]
    train_script.main(options)
    state = torch.load("checkpoints/model_last_lavt.pth", weights_only=True)["model"]
    state.pop("temp")
    torch.save(state, "bare.pth")
    result = []
    for path in ("bare.pth", "checkpoints/model_last_lavt.pth"):
        argv = [*shapes.options, "--model", "crossvlt", "--resume", path, "--split", "val"]
        test_script.main([*argv, "--results", "r.json"])
        result.append(json.loads(Path("r.json").read_text())["splits"])
    assert result[0] == result[1]


def test_defaults_of_a_model() -> None:
    """CrossVLT's published command line names neither its batch size nor its tokens."""
    cross = parse_train(["--model", "crossvlt"])
    assert (cross.lr, cross.batch_size, cross.max_tokens) == (3e-5, 6, 21)
    assert cross.val_expressions == "all"
    lavt = parse_train([])
    assert (lavt.lr, lavt.batch_size, lavt.max_tokens) == (5e-5, 8, 20)
    assert lavt.val_expressions == "one"


def test_union_masks_are_an_option_and_are_labelled(
    trained: Path, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*shapes.options, "--resume", str(trained / "checkpoints/model_best_whole.pth")]
    protocols = []
    for mode in ("release", "union"):
        argv = [*options, "--split", "testA", "--mask_mode", mode, "--results", "r.json"]
        test_script.main(argv)
        protocols.append(json.loads(Path("r.json").read_text())["protocol"])
    assert [p["mask_mode"] for p in protocols] == ["release", "union"]
    assert [p["label"] for p in protocols] == ["img_size=56", "mask_mode=union img_size=56"]


def test_demo_of_the_generated_pairs(
    trained: Path, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overlay for each image and expression of RefShapes' demo.json."""
    monkeypatch.chdir(tmp_path)
    pairs = json.loads((shapes.root / "demo.json").read_text())
    assert pairs
    assert all((shapes.root / pair["image"]).is_file() for pair in pairs)
    checkpoint = str(trained / "checkpoints/model_best_whole.pth")
    options = [*shapes.options, "--resume", checkpoint, "--output", "out"]
    demo_script.main([*options, "--list", str(shapes.root / "demo.json")])
    assert len(list(Path("out").glob("*.png"))) == sum(len(pair["sentence"]) for pair in pairs)


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ([], 7),
        (["--window12"], 12),
        (["--pretrained_swin_weights", "w/swin_base_patch4_window12_384_22k.pth"], 12),
        (["--pretrained_swin_weights", "window12/swin_tiny_patch4_window7_224.pth"], 7),
    ],
)
def test_window_of_a_training_run(options: list[str], window: int) -> None:
    """As published: the name of the ImageNet file decides, or here the flag."""
    assert parse_train(options).window == window


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """Restores torch's global switches."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("script", ["test", "demo"])
def test_speed_flags_where_nothing_is_trained(
    script: str, trained: Path, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory format and TF32; compiling takes minutes, and is tested on parts of the network."""
    monkeypatch.chdir(tmp_path)
    options = [*shapes.options, "--resume", str(trained / "checkpoints/model_best_whole.pth")]
    for name, extra in (("plain", []), ("fast", ["--channels-last", "--tf32"])):
        if script == "test":
            where = ["--split", "testA", "--results", f"{name}.json"]
            test_script.main([*options, *extra, *where])
        else:
            where = ["--list", str(shapes.root / "demo.json"), "--output", name]
            demo_script.main([*options, *extra, *where])
        assert torch.backends.cuda.matmul.allow_tf32 is bool(extra)
        assert torch.backends.cudnn.allow_tf32 is bool(extra)
    if script == "test":
        plain, fast = (
            json.loads(Path(f"{name}.json").read_text())["splits"]["testA"]["all"]
            for name in ("plain", "fast")
        )
        assert fast["mIoU"] == pytest.approx(plain["mIoU"], abs=0.1)
    else:
        plain, fast = (sorted(p.name for p in Path(n).iterdir()) for n in ("plain", "fast"))
        assert plain == fast
        assert plain
