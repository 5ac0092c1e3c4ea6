"""Recipes: one file a published run, and how a command line takes them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

import train as train_script
from args import (
    OF_MODEL,
    RECIPES,
    expand_recipes,
    list_recipes,
    parse_test,
    parse_train,
    protocol_of,
)
from lib.errors import InputError
from lib.segmentation import MODELS
from tests.refer_files import CC0_ROOT
from tests.scripts import Shapes, jsonl
from tools.demo_jobs import parse_demo
from tools.trained import complete

W12 = "swin_base_patch4_window12_384_22k.pth"
UNC, ALL = "unc", "val,testA,testB"
# name: model, dataset, splitBy, model_id, loss, splits; the rest is the same for a model.
PUBLISHED = {
    "refcoco_lavt": ("lavt", "refcoco", UNC, "refcoco", "ce", ALL),
    "refcoco+_lavt": ("lavt", "refcoco+", UNC, "refcoco+", "ce", ALL),
    "refcocog_umd_lavt": ("lavt", "refcocog", "umd", "gref_umd", "ce", "val,test"),
    "refcocog_google_lavt": ("lavt", "refcocog", "google", "gref_google", "ce", "val"),
    "refcoco_lavt_one_dice": ("lavt_one", "refcoco", UNC, None, "dice", ALL),
    "refcoco+_lavt_one_dice": ("lavt_one", "refcoco+", UNC, None, "dice", ALL),
    "refcocog_umd_lavt_one_dice": ("lavt_one", "refcocog", "umd", None, "dice", "val,test"),
    "refcocog_google_lavt_one_dice": ("lavt_one", "refcocog", "google", None, "dice", "val"),
    "refcoco_crossvlt": ("crossvlt", "refcoco", UNC, None, "ce", ALL),
    "refcoco+_crossvlt": ("crossvlt", "refcoco+", UNC, None, "ce", ALL),
    "refcocog_umd_crossvlt": ("crossvlt", "refcocog", "umd", None, "ce", "val,test"),
    "refcoco_lavt_448_cat": ("lavt", "refcoco", UNC, None, "ce", ALL),
}
# The same data, with MaskRIS.
MASKED = {
    f"{data}_{kind}": PUBLISHED[f"{data}_lavt"]
    for data in ("refcoco", "refcoco+", "refcocog_umd")
    for kind in ("maskris", "modern")
}


def path_of(name: str) -> str:
    return f"@recipes/{name}.args"


def parse_completely(recipe: str) -> Namespace:
    """Arguments of test.py with the published defaults, as of a file that records nothing."""
    args = parse_test([recipe])
    settings = vars(parse_train([recipe]))
    complete(args, {name: settings[name] for name in ("window", "max_tokens")}, {})
    return args


def test_every_published_run_has_a_recipe() -> None:
    assert list_recipes() == sorted(map(path_of, PUBLISHED | MASKED))
    assert len({parse_train([r]).model_id for r in list_recipes()}) == len(list_recipes())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_run(name: str) -> None:
    """Specified for all: AdamW with 1e-2, Swin-B; 480 pixels and windows of 12 but for one."""
    model, dataset, split_by, model_id, loss, _ = PUBLISHED[name]
    args = parse_train([path_of(name)])
    assert (args.model, args.dataset, args.splitBy, args.loss) == (model, dataset, split_by, loss)
    assert model_id in (None, args.model_id)
    crossvlt, small = model == "crossvlt", name == "refcoco_lavt_448_cat"
    assert (args.lr, args.batch_size) == ((3e-5, 6) if crossvlt else (5e-5, 8))
    assert (args.lr, args.batch_size) == (MODELS[model].lr, MODELS[model].batch_size)
    assert (args.weight_decay, args.swin_type, args.amsgrad) == (1e-2, "base", False)
    assert (args.epochs, args.img_size, args.window) == ((45, 448, 7) if small else (40, 480, 12))
    weights = Path(args.pretrained_swin_weights)
    assert weights.parent == Path("pretrained_weights")
    assert (weights.name == W12) == (not small)
    # And nothing else than what the option list gives by default.
    named = "model dataset splitBy model_id loss lr batch_size img_size epochs window window12"
    usual = vars(parse_train(["--model", model]))
    changed = {k for k, v in vars(args).items() if v != usual[k]}
    assert changed <= {*named.split(), "pretrained_swin_weights"}


@pytest.mark.parametrize("name", MASKED)
def test_a_recipe_with_masks_is_as_specified(name: str) -> None:
    model, dataset, split_by, _, loss, _ = MASKED[name]
    args = parse_train([path_of(name)])
    assert (args.model, args.dataset, args.splitBy, args.loss) == (model, dataset, split_by, loss)
    assert (args.maskris, args.maskris_weight, args.maskris_ratio) == (True, 0.5, 0.75)
    assert (args.maskris_patch, args.maskris_text, args.clip_grad) == (32, 0.15, 1.0)
    base = vars(
        parse_train([path_of(name.replace("_maskris", "_lavt").replace("_modern", "_lavt"))])
    )
    changed = {k: v for k, v in vars(args).items() if v != base[k]}
    for k in ("model_id", "maskris", "clip_grad"):
        changed.pop(k)
    if name.endswith("_maskris"):
        assert changed == {}
        return
    assert Path(changed.pop("pretrained_swin_weights")).name == W12.replace("12_384", "7_224")
    assert changed == {
        "window12": False,
        "window": 7,
        "img_size": 448,
        "text": "sent",
        "lr": 1e-4,
        "backbone_lr_scale": 0.1,
        "lang_layers": None,
        "norm_decay": "biases",
        "warmup_steps": 1500,
        "epochs": 50,
        "amp": "fp16",
    }
    assert (args.warmup_start, args.sched, args.min_lr, args.weight_decay) == (
        1e-3,
        "poly",
        0,
        1e-2,
    )


@pytest.mark.parametrize("name", [*PUBLISHED, *MASKED])
def test_a_recipe_trains(
    name: str, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, of a network and images that are far smaller."""
    monkeypatch.chdir(tmp_path)
    small = ["--refer_data_root", str(CC0_ROOT), *shapes.options[2:6], "--device", "cpu"]
    small += ["--swin_type", "micro", "--img_size", "64", "--pretrained_swin_weights", ""]
    small += ["--text_from_scratch", "--lang_layers", "all", "--epochs", "1", "--workers", "0"]
    small += ["--batch-size", "3", "--print_freq", "1", "--val_split", "train"]
    args = parse_train([path_of(name)])
    small += ["--splitBy", args.splitBy.replace("google", "umd")]  # of the data there are
    train_script.main([path_of(name), *small])
    records = jsonl(Path("models") / args.model_id / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    assert [step["step"] for step in steps] == [1, 2]
    names = {args.loss, *(["distill"] if args.maskris else [])}
    assert all(names <= step["losses"].keys() for step in steps)
    assert all(step["loss"] > 0 for step in steps)


@pytest.mark.parametrize("name", [*PUBLISHED, *MASKED])
def test_the_same_recipe_tests_what_it_trained(name: str) -> None:
    trained, tested = parse_train([path_of(name)]), parse_completely(path_of(name))
    assert tested.splits == (PUBLISHED | MASKED)[name][-1].split(",")
    assert tested.resume == f"./checkpoints/model_best_{trained.model_id}.pth"
    flags = (*OF_MODEL, "window")
    assert [getattr(tested, f) for f in flags] == [getattr(trained, f) for f in flags]
    for option in ("dataset", "splitBy", "img_size", "model_id", "max_tokens"):
        assert getattr(tested, option) == getattr(trained, option)


def test_only_the_reproduction_is_tested_on_joined_expressions() -> None:
    joined = [n for n in PUBLISHED if parse_test([path_of(n)]).eval_mode != "each"]
    assert joined == ["refcoco_lavt_448_cat"]
    assert parse_test([path_of(*joined)]).eval_mode == "cat"
    standard = [n for n in PUBLISHED if protocol_of(parse_completely(path_of(n))).is_standard]
    assert set(standard) == set(PUBLISHED) - set(joined)


def test_the_demo_takes_a_recipe_too() -> None:
    line = ["--image", "a.jpg", "--sentence", "@me", "@b.c", "--resume", "a.pth"]
    args = parse_demo([path_of("refcoco_lavt"), *line])
    assert (args.window12, args.resume) == (True, "a.pth")
    assert args.sentence == ["@me", "@b.c"]  # no recipes


@pytest.mark.parametrize("first", [True, False])
def test_the_command_line_overrides(first: bool) -> None:
    recipe, own = [path_of("refcoco_lavt")], ["--lr", "1e-4", "--img_size", "384"]
    args = parse_train(recipe + own if first else own + recipe)
    assert (args.lr, args.img_size, args.epochs) == (1e-4, 384, 40)


def test_comments_blank_lines_quotes_and_sections(tmp_path: Path) -> None:
    recipe = tmp_path / "a.args"
    recipe.write_text(
        '# a comment\n\n--model_id x  # another\n  --refer_data_root "a folder"\n--pin_mem\n'
        "[train.py]\n--wd=0.5\n[test.py]\n--split val\n"
    )
    shared = ["--model_id", "x", "--refer_data_root", "a folder", "--pin_mem"]
    assert expand_recipes([f"@{recipe}"], "train.py") == [*shared, "--wd=0.5"]
    assert expand_recipes(["--lr", "1", f"@{recipe}"], "test.py") == [
        *shared,
        "--split",
        "val",
        "--lr",
        "1",
    ]
    assert expand_recipes([f"@{recipe}"], "demo_inference.py") == shared
    other = tmp_path / "b.args"
    other.write_text("--model_id y\n")
    assert parse_train([f"@{recipe}", f"@{other}"]).model_id == "y"


def test_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_train([path_of("refcoco_lavt")]).model_id == "refcoco"
    assert parse_train([f"@{RECIPES / 'refcoco_lavt.args'}"]).model_id == "refcoco"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lr 3\n", "line 1: a flag begins with --, not: lr 3"),
        (b"\n--model_id 'x\n", "line 2: No closing quotation, in: --model_id 'x"),
        (b"[tran.py]\n--lr 3\n", r"line 1: \[tran.py\] is none of train.py, test.py"),
        (b"\xff\xfe", "cannot be read"),
        (b"--no_such 3\n", "unrecognized arguments: --no_such 3"),
        (b"--lr often\n", "argument --lr: invalid float value"),
    ],
)
def test_a_bad_recipe_is_one_clear_line(content: bytes, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "a.args"
    recipe.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        parse_train([f"@{recipe}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["@recipes/refcoco.args", "@recipes/refcoco_lavt", "@"])
def test_a_missing_recipe_lists_those_there_are(name: str) -> None:
    with pytest.raises(InputError, match=r"no recipe .*: there are @recipes/refcoco\+_crossvlt"):
        parse_train([name])
