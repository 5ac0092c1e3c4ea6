"""Facts that contradict each other are told: of checkpoint, command line and tokenizer."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import demo_inference
import test as test_script
import train as train_script
from lib.checkpoint import read_checkpoint
from tests.scripts import Shapes, jsonl, one_line_error, run, torchrun

LAST = "checkpoints/model_last_{}.pth"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def options(shapes: Shapes) -> list[str]:
    return [*shapes.train_options, "--epochs", "4"]


@pytest.fixture(scope="module")
def half(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run stopped after two of its four epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("half"))
        train_script.main([*options, "--stop_after", "2", "--model_id", "half"])
    return folder / LAST.format("half")


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("finished"))
        train_script.main([*options, "--epochs", "1"])
    return folder


def test_options(shapes: Shapes) -> list[str]:
    return [*shapes.options, "--split", "val", "--results", "r.json"]


test_options.__test__ = False  # type: ignore[attr-defined]


# ---- steps of another size ----


def rates(model_id: str) -> dict[int, list[float]]:
    """Learning rate of each step, by epoch."""
    found: dict[int, list[float]] = {}
    for record in jsonl(Path("models") / model_id / "metrics.jsonl"):
        if record["kind"] == "step":
            found.setdefault(record["epoch"], []).append(record["lr"])
    return found


def check_schedule(model_id: str) -> None:
    """Published: 1e-3 (1 - t)^0.9 at each part t of training."""
    for epoch, seen in rates(model_id).items():
        for step, rate in enumerate(seen):
            part = (epoch + step / len(seen)) / 4
            assert rate == pytest.approx(1e-3 * (1 - part) ** 0.9), (epoch, step)
    assert sorted(rates(model_id)) == [2, 3]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ([], ""),
        (["--batch-size", "8"], "batch_size 4 -> 8"),
        (["--batch-size", "2"], "batch_size 4 -> 2"),
        (["--accumulate", "2"], "accumulate 1 -> 2"),
        (["--batch-size", "2", "--accumulate", "2"], "batch_size 4 -> 2, accumulate 1 -> 2"),
    ],
)
def test_the_schedule_goes_on_at_the_same_part(
    changed: list[str], said: str, options: list[str], half: Path, capsys: Any
) -> None:
    train_script.main([*options, *changed, "--resume", str(half), "--model_id", "rest"])
    check_schedule("rest")
    told = [line for line in capsys.readouterr().out.splitlines() if "other steps" in line]
    assert len(told) == bool(changed)
    if changed:
        assert said in told[0]
        assert "goes on after 2 of 4 epochs, lr 0.000536" in told[0]


def test_another_number_of_processes(options: list[str], half: Path, tmp_path: Path) -> None:
    argv = [*options, "--resume", str(half), "--model_id", "rest"]
    done = run(tmp_path, "train.py", *argv, launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    check_schedule("rest")
    assert done.stdout.count("processes 1 -> 2") == 1


def test_other_data(options: list[str], half: Path, capsys: Any, monkeypatch: Any) -> None:
    """With half of the references an epoch has half of the steps."""
    real = train_script.ReferDataset

    def smaller(*args: Any, **kwargs: Any) -> Any:
        dataset = real(*args, **kwargs)
        if dataset.split == "train":
            dataset.samples_of_ref = dataset.samples_of_ref[: len(dataset.samples_of_ref) // 2]
        return dataset

    monkeypatch.setattr(train_script, "ReferDataset", smaller)
    train_script.main([*options, "--resume", str(half), "--model_id", "rest"])
    check_schedule("rest")
    assert "other steps than before: steps per epoch" in capsys.readouterr().out


def test_a_published_checkpoint_counts_steps(options: list[str], half: Path, capsys: Any) -> None:
    """Its scheduler's count is of its own batches and processes."""
    content = read_checkpoint(half)
    content["lr_scheduler"]["last_epoch"] = 2 * 999
    content["lr_scheduler"]["_step_count"] = 2 * 999 + 1
    content["args"] = argparse.Namespace(batch_size=8, lr=1e-3, img_size=56)
    del content["progress"]
    torch.save(content, "published.pth")
    train_script.main([*options, "--resume", "published.pth", "--model_id", "rest"])
    check_schedule("rest")
    assert "steps per epoch 999 -> " in capsys.readouterr().out


# ---- a finished run ----


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("model_id", ["lavt", "other"])
def test_nothing_is_left_of_a_finished_run(
    model_id: str, options: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    before = files(finished)
    for which in ("last", "best"):
        path = f"checkpoints/model_{which}_lavt.pth"
        argv = [*options, "--epochs", "1", "--resume", path, "--model_id", model_id]
        message = one_line_error(train_script.main, argv)
        assert f"{path}: epoch 1 of 1: nothing left" in message
        assert "--epochs N" in message
        assert "--init_from" in message
    assert files(finished) == before


def test_a_finished_run_started_again_by_a_scheduler_ends_well(
    options: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(finished)
    before = files(finished)
    train_script.main([*options, "--epochs", "1", "--resume", "auto"])
    assert "epoch 1 of 1: nothing left" in capsys.readouterr().out
    assert files(finished) == before


# ---- a new run from given weights ----


def as_safetensors(content: dict[str, Any]) -> str:
    state = {f"module.{k}": v for k, v in content["model"].items()}
    state |= {f"module.text_encoder.{k}": v for k, v in content["bert_model"].items()}
    save_file(state, "a.safetensors")
    return "a.safetensors"


def as_file(content: dict[str, Any]) -> str:
    torch.save(content, "a.pth")
    return "a.pth"


FORMS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ours": as_file,
    "published": lambda c: as_file({k: c[k] for k in ("model", "bert_model")}),
    "bare": lambda c: as_file(
        c["model"] | {f"text_encoder.{k}": v for k, v in c["bert_model"].items()}
    ),
    "safetensors": as_safetensors,
}


@pytest.mark.parametrize("form", FORMS)
def test_init_from(form: str, options: list[str], half: Path, capsys: Any) -> None:
    """The weights are there at the first step; epoch and schedule begin anew."""
    content = read_checkpoint(half)
    source = FORMS[form](content)
    argv = [*options, "--epochs", "1", "--init_from", source, "--model_id", "new"]
    train_script.main([*argv, "--lr", "1e-30"])
    out = capsys.readouterr().out
    assert f"weights: all of {source}; a new run from epoch 0" in out
    assert "random" not in out
    made = read_checkpoint(LAST.format("new"))
    parameters = [k for k in content["model"] if "running" not in k and "batches" not in k]
    assert all(torch.equal(made["model"][k], content["model"][k]) for k in parameters)
    assert all(torch.equal(v, made["bert_model"][k]) for k, v in content["bert_model"].items())
    assert made["epoch"] == 0
    assert sorted(rates("new")) == [0]


def test_init_from_with_another_grid_and_image_size(options: list[str], half: Path) -> None:
    argv = [*options, "--epochs", "1", "--lr", "1e-30", "--init_from", str(half)]
    train_script.main([*argv, "--img_size", "64", "--ape", "16", "--model_id", "new"])
    old, new = read_checkpoint(half)["model"], read_checkpoint(LAST.format("new"))["model"]
    key = "backbone.absolute_pos_embed"
    assert new[key].shape[-2:] == (16, 16)
    resized = torch.nn.functional.interpolate(old[key], (16, 16), mode="bicubic")
    torch.testing.assert_close(new[key], resized)
    train_script.main([*argv, "--window12", "--model_id", "wide"])
    table = "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
    assert len(read_checkpoint(LAST.format("wide"))["model"][table]) == 23**2


def test_what_init_from_changes_is_told(options: list[str], half: Path, capsys: Any) -> None:
    argv = [*options, "--epochs", "1", "--init_from", str(half), "--gate", "sigmoid"]
    train_script.main([*argv, "--mha", "2-2-2-2", "--ape", "7"])
    out = capsys.readouterr().out
    assert "--gate sigmoid: the checkpoint was trained with tanh" in out
    assert "--mha 2-2-2-2: the checkpoint was trained with 1-1-1-1" in out
    assert "weights: but backbone.absolute_pos_embed: resized, or not in the file" in out
    assert Path(LAST.format("lavt")).is_file()


def test_init_from_a_file_that_the_run_would_rename(options: list[str], half: Path) -> None:
    path = Path(LAST.format("lavt"))
    path.parent.mkdir()
    shutil.copy(half, path)
    message = one_line_error(train_script.main, [*options, "--init_from", str(path)])
    assert "give another one" in message
    assert path.is_file()


def test_init_from_is_for_a_fresh_run(options: list[str], half: Path, capsys: Any) -> None:
    argv = [*options, "--init_from", str(half)]
    assert "give one of the two" in one_line_error(
        train_script.main, [*argv, "--resume", str(half)]
    )
    argv += ["--resume", "auto", "--stop_after", "1", "--epochs", "2"]
    train_script.main(argv)
    train_script.main(argv)  # goes on with the state of the first
    assert "which is resumed" in capsys.readouterr().out
    assert read_checkpoint(LAST.format("lavt"))["epoch"] == 1


@pytest.mark.parametrize("source", ["missing.pth", "model of another size"])
def test_init_from_what_does_not_fit(source: str, options: list[str], half: Path) -> None:
    argv = [*options, "--init_from", str(half), "--swin_type", "tiny"]
    if source == "missing.pth":
        argv = [*options, "--init_from", source]
        assert "no checkpoint at missing.pth" in one_line_error(train_script.main, argv)
    else:
        assert "--swin_type micro" in one_line_error(train_script.main, argv)


# ---- where weights come from ----


def test_random_parts_are_named(options: list[str], capsys: Any) -> None:
    train_script.main([*options, "--epochs", "1"])
    out = capsys.readouterr().out
    assert "backbone: random weights; published results begin with ImageNet's" in out
    assert "--pretrained_swin_weights" in out
    assert "text encoder: random weights (--text_from_scratch)" in out
    assert "fusion and decoder: random weights, as published" in out


@pytest.mark.parametrize("layers", [["--lang_layers", "10"], ["--lang_layers", "0"]])
def test_random_and_frozen_is_an_error(layers: list[str], options: list[str]) -> None:
    message = one_line_error(train_script.main, [*options, *layers])
    assert "random and never trained; give --lang_layers all" in message
    assert not Path("models").exists()


# ---- settings of a checkpoint and of its use ----

OTHERWISE = {
    "img_size": ("112", "56"),
    "max_tokens": ("5", "20"),
    "text": ("sent", "raw"),
    "mask_mode": ("union", "release"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_another_setting_than_in_training_is_a_line(
    name: str, shapes: Shapes, half: Path, capsys: Any
) -> None:
    value, trained = OTHERWISE[name]
    argv = [*test_options(shapes), "--resume", str(half)]
    test_script.main([*argv, f"--{name}", value])
    out = capsys.readouterr().out
    assert out.count("the checkpoint was trained with") == 1
    assert f"--{name} {value}: the checkpoint was trained with {trained}" in out


def test_the_same_settings_are_no_line(shapes: Shapes, half: Path, capsys: Any) -> None:
    test_script.main([*test_options(shapes), "--resume", str(half)])
    assert "trained with" not in capsys.readouterr().out


def test_another_dataset_is_a_line(shapes: Shapes, half: Path, capsys: Any) -> None:
    root = Path("data")
    shutil.copytree(shapes.root, root)
    (root / "refcoco").rename(root / "aerial")
    argv = [*test_options(shapes), "--refer_data_root", str(root), "--dataset", "aerial"]
    test_script.main([*argv, "--resume", str(half)])
    assert "--dataset aerial: the checkpoint was trained with refcoco" in capsys.readouterr().out


def test_the_demo_says_it_too(shapes: Shapes, half: Path, capsys: Any) -> None:
    Image.new("RGB", (60, 40)).save("p.png")
    argv = [*shapes.options, "--img_size", "480", "--image", "p.png", "--sentence", "red"]
    demo_inference.main([*argv, "--resume", str(half), "--output", "o"])
    assert "--img_size 480: the checkpoint was trained with 56" in capsys.readouterr().out


# ---- tokenizer and network ----


def tokenizer_with(shapes: Shapes, change: Callable[[list[str]], list[str]]) -> str:
    folder = Path("words")
    shutil.copytree(shapes.root / "bert", folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    words = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join(change(words)) + "\n")
    return str(folder)


CHANGES: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "more": (lambda words: [*words, "another", "word"], "would have no embedding"),
    "fewer": (lambda words: words[:-1], "would be unknown"),
    "half": (lambda words: words[: len(words) // 2], "would be unknown"),
    "others": (lambda words: [*words[:-2], words[-1], words[-2]], "not those that"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tokenizer_of_another_network(
    change: str, options: list[str], shapes: Shapes, half: Path
) -> None:
    words, message = CHANGES[change]
    of_words = ["--bert_tokenizer", tokenizer_with(shapes, words)]
    Image.new("RGB", (60, 40)).save("p.png")
    demo = ["--image", "p.png", "--sentence", "red", "--output", "o"]
    for main, argv in (
        (test_script.main, test_options(shapes)),
        (demo_inference.main, [*shapes.options, *demo]),
        (train_script.main, options),
    ):
        assert message in one_line_error(main, [*argv, *of_words, "--resume", str(half)])
    assert not Path("r.json").exists()
    if change != "others":
        assert message in one_line_error(train_script.main, [*options, *of_words])


def test_a_tokenizer_that_keeps_capitals(options: list[str], shapes: Shapes, half: Path) -> None:
    folder = tokenizer_with(shapes, list)
    (Path(folder) / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    keeps = ["--bert_tokenizer", folder]
    for argv in (options, [*options, "--resume", str(half)], [*options, "--init_from", str(half)]):
        message = one_line_error(train_script.main, [*argv, *keeps])
        assert "set do_lower_case to true in its tokenizer_config.json" in message
    argv = [*test_options(shapes), *keeps, "--resume", str(half)]
    assert "keeps capitals" in one_line_error(test_script.main, argv)
    (Path(folder) / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    test_script.main(argv)  # the remedy works


def test_pretrained_weights_with_the_words_of_others(shapes: Shapes, half: Path) -> None:
    """Of the same number, but in another order."""
    bert = Path("bert")
    shutil.copytree(shapes.root / "bert", bert)
    torch.save(read_checkpoint(half)["bert_model"], bert / "pytorch_model.bin")
    words = tokenizer_with(shapes, CHANGES["others"][0])
    argv = [*shapes.options, "--ck_bert", str(bert), "--batch-size", "4", "--epochs", "1"]
    message = one_line_error(train_script.main, [*argv, "--bert_tokenizer", words])
    assert "not those that the weights were trained with" in message
    train_script.main([*argv, "--bert_tokenizer", str(bert), "--lr", "1e-30"])
    made = read_checkpoint(LAST.format("lavt"))["bert_model"]
    assert all(torch.equal(v, made[k]) for k, v in read_checkpoint(half)["bert_model"].items())


def test_the_checkpoint_knows_its_vocabulary(half: Path) -> None:
    assert len(read_checkpoint(half)["args"]["vocabulary"]) == 64
    assert (
        len(json.loads((half.parents[1] / "models/half/args.json").read_text())["vocabulary"]) == 64
    )
