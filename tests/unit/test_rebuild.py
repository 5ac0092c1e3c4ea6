"""A model is rebuilt from its file alone: what is recorded, what weights show, what is assumed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bert import config_values, encode, load_tokenizer, tokenizer_text, vocabulary_of
from bert.text_encoder import load_config
from lib.checkpoint import read_checkpoint, write_checkpoint
from lib.checkpoint.pretrained import read_folder, write_folder
from lib.checkpoint.rebuild import Trained, open_trained
from lib.errors import InputError
from lib.model import Segmenter
from lib.segmentation import build_model
from lib.swin import SWIN_SIZES, SwinSize
from lib.variants import CHOICES, PUBLISHED, Variant
from tests.refer_files import TINY_BERT

TOKENIZER = load_tokenizer(TINY_BERT)
OWN = {"mha": "2-1-4-1", "fusion_drop": 0.1}
UNUSUAL = {"pwam_norm": "layer", "pwam_combine": "add", "gate": "relu"}


@pytest.fixture(autouse=True)
def _nano(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SWIN_SIZES, "nano", SwinSize(8, (2, 2, 2, 2), (1, 2, 4, 8)))
    monkeypatch.setitem(SWIN_SIZES, "thin", SwinSize(32, (1, 1, 1, 1), (1, 1, 1, 1)))


def build(name: str, window: int = 7, ape: int = 0, **options: Any) -> Segmenter:
    torch.manual_seed(0)
    sizes = {"swin_type": swin_of(name), "window_size": window, "ape_grid": ape}
    model = build_model(name, text_config=str(TINY_BERT), **sizes, **options)
    with torch.no_grad():  # fresh biases and gates are zero, and would hide what is not loaded
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def swin_of(name: str) -> str:
    """CrossVLT's fusion needs a width of its own."""
    return "thin" if name == "crossvlt" else "nano"


def logits(model: Segmenter, expression: str = "the blue one on the left") -> Tensor:
    image = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(image, *encode(TOKENIZER, [expression], 20))


def record(network: Segmenter, /, **args: Any) -> dict[str, Any]:
    """What train.py writes besides the training state."""
    bert = {"config": config_values(network.text_config), "tokenizer": tokenizer_text(TOKENIZER)}
    return {**network.to_published(), "args": args, "bert": bert}


def write(content: dict[str, Any], folder: Path) -> Path:
    write_checkpoint(content, folder / "a.pth")
    return folder / "a.pth"


CASES: dict[str, Callable[[], tuple[Segmenter, dict[str, Any]]]] = {
    "lavt": lambda: (
        build("lavt", ape=4, mha=OWN["mha"], fusion_drop=0.1, variant=Variant(**UNUSUAL)),
        {"model": "lavt", "window": 7, "ape": 4, **OWN, **UNUSUAL},
    ),
    "lavt_one": lambda: (
        build("lavt_one", window=12, variant=Variant(fusion="concat")),
        {"model": "lavt_one", "window": 12, "ape": 0, "mha": "", "fusion": "concat"},
    ),
    "crossvlt": lambda: (build("crossvlt"), {"model": "crossvlt", "window": 7, "mha": ""}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_model_needs_nothing_else(name: str, tmp_path: Path) -> None:
    model, args = CASES[name]()
    args |= {"swin_type": swin_of(name), "img_size": 96, "max_tokens": 11, "text": "sent"}
    args |= {"dataset": "mine", "splitBy": "x", "mask_mode": "union"}
    args = asdict(PUBLISHED) | args
    trained = open_trained(write(record(model, **args), tmp_path))
    assert torch.equal(logits(trained.model), logits(model))
    assert not trained.model.training
    assert vocabulary_of(trained.tokenizer) == vocabulary_of(TOKENIZER)
    told = {k: v for k, v in args.items() if k != "mha"}
    assert {k: trained.settings[k] for k in told} == told
    assert set(told) <= trained.recorded
    assert "not in the file" not in trained.summary


@pytest.mark.parametrize("name", CASES)
def test_as_a_folder_it_is_the_same(name: str, tmp_path: Path) -> None:
    model, args = CASES[name]()
    args |= {"swin_type": swin_of(name), "img_size": 96, "vocabulary": vocabulary_of(TOKENIZER)}
    first = open_trained(write(record(model, **args), tmp_path), accelerate=False)
    files = write_folder(tmp_path / "folder", first, "# a card\n")
    assert sorted(p.name for p in files) == sorted(p.name for p in (tmp_path / "folder").iterdir())
    again = open_trained(tmp_path / "folder", accelerate=False)
    assert torch.equal(logits(again.model), logits(model))
    assert again.settings == first.settings
    assert tokenizer_text(again.tokenizer) == tokenizer_text(first.tokenizer)
    with pytest.raises(InputError, match="--swin_type tiny contradicts"):
        open_trained(tmp_path / "folder", {"swin_type": "tiny"})


@pytest.mark.parametrize("release_args", [False, True])
@pytest.mark.parametrize(("name", "window"), [("lavt", 12), ("lavt_one", 7), ("crossvlt", 12)])
def test_published_files_record_nothing(
    name: str, window: int, release_args: bool, tmp_path: Path
) -> None:
    """Names and shapes tell the model, its size, window and grid; the rest is as published."""
    model = build(name, window=window, ape=5)
    content: dict[str, Any] = dict(model.to_published())
    if release_args:  # the release's has window12, which is not always right
        content["args"] = argparse.Namespace(
            swin_type=swin_of(name), window12=False, img_size=480, mha=""
        )
    path = write(content, tmp_path)
    trained = open_trained(path, {"bert_tokenizer": str(TINY_BERT)})
    assert torch.equal(logits(trained.model), logits(model))
    s = trained.settings
    assert (s["model"], s["swin_type"], s["window"], s["ape"]) == (name, swin_of(name), window, 5)
    assert (s["img_size"], s["max_tokens"]) == (480, 21 if name == "crossvlt" else 20)
    assert ("img_size" in trained.recorded) == release_args
    if not release_args:
        said = trained.summary.split("not in the file, taken as published: ")[1]
        assert "img_size 480" in said
        assert ("mha 1-1-1-1" in said) == (name != "crossvlt")
        assert ("the variant as far as" in said) == (name != "crossvlt")


@pytest.mark.parametrize("name", ["lavt_one", "crossvlt"])
def test_a_bare_state_dict(name: str, tmp_path: Path) -> None:
    model = build(name)
    state = dict(model.state_dict())
    trained = open_trained(write(state, tmp_path), {"bert_tokenizer": str(TINY_BERT)})
    assert torch.equal(logits(trained.model), logits(model))


def test_what_weights_do_not_show_may_be_given(tmp_path: Path) -> None:
    model = build("lavt", mha="2-1-4-1", variant=Variant(pwam_norm="batch", pwam_combine="add"))
    path = write(dict(model.to_published()), tmp_path)
    bert = {"bert_tokenizer": str(TINY_BERT)}
    trained = open_trained(path, {**bert, "mha": "2-1-4-1", "pwam_combine": "add"})
    assert torch.equal(logits(trained.model), logits(model))
    assert trained.settings["pwam_norm"] == "batch"
    assert not torch.equal(logits(open_trained(path, bert).model), logits(model))
    # lavt and lavt_one are one network, and this file says nothing of how it was trained.
    assert open_trained(path, {**bert, "model": "lavt_one"}).settings["model"] == "lavt_one"


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        (Variant(fusion="mul"), "give --fusion add or mul"),
        (Variant(gate="off"), "give --lang_path off .or --gate off."),
    ],
)
def test_an_unrecorded_variant_that_cannot_be_told(
    variant: Variant, says: str, tmp_path: Path
) -> None:
    model = build("lavt", variant=variant)
    path = write(dict(model.to_published()), tmp_path)
    bert = {"bert_tokenizer": str(TINY_BERT)}
    with pytest.raises(InputError, match=says):
        open_trained(path, bert)
    trained = open_trained(path, {**bert, **variant.changed()})
    assert torch.equal(logits(trained.model), logits(model))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": "crossvlt"}, "--model crossvlt contradicts .*--model lavt:"),
        ({"model": "lavt_one"}, "--model lavt_one contradicts .*--model lavt:"),
        ({"swin_type": "base"}, "--swin_type base contradicts .*--swin_type nano:"),
        ({"window": 12}, "--window12 contradicts .*window 7"),
        ({"ape": 0}, "--ape 0 contradicts .*--ape 4:"),
        ({"mha": "1-1-1-1"}, "--mha 1-1-1-1 contradicts .*--mha 2-1-4-1:"),
        ({"fusion_drop": 0.0}, "--fusion_drop 0.0 contradicts .*--fusion_drop 0.1:"),
        ({"gate": "tanh"}, "--gate tanh contradicts .*--gate relu:"),
        ({"max_tokens": 65}, "--max_tokens 65: the text encoder has 64 positions"),
    ],
)
def test_a_flag_that_contradicts_the_file(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    model, args = CASES["lavt"]()
    path = write(record(model, swin_type="nano", **args), tmp_path)
    with pytest.raises(InputError, match=says):
        open_trained(path, given)
    same = {k: args.get(k, "nano") for k in given if k != "max_tokens"}
    assert open_trained(path, same).settings["swin_type"] == "nano"


def test_another_bert_than_the_files(tmp_path: Path) -> None:
    model, args = CASES["lavt"]()
    path = write(record(model, swin_type="nano", **args), tmp_path)
    other = tmp_path / "bert"
    other.mkdir()
    config = json.loads((TINY_BERT / "config.json").read_text()) | {"num_attention_heads": 4}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"has num_attention_heads 4, .* 2: leave"):
        open_trained(path, {"ck_bert": str(other)})
    assert open_trained(path, {"ck_bert": str(TINY_BERT), "bert_tokenizer": str(TINY_BERT)})


def test_heads_of_a_bert_of_unknown_width_are_asked_for(tmp_path: Path) -> None:
    path = write(dict(build("lavt_one").to_published()), tmp_path)
    with pytest.raises(InputError, match=r"heads of its BERT of width 16: .* --ck_bert"):
        open_trained(path)


@pytest.mark.parametrize("width", [128, 384])
def test_heads_of_published_berts_are_known(width: int, tmp_path: Path) -> None:
    config = load_config(str(TINY_BERT))
    heads = {128: 2, 384: 12}[width]
    config.update({"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 1})
    model = build_model("lavt", swin_type="nano", window_size=7, text_config=config)
    path = write(dict(model.eval().to_published()), tmp_path)
    bert = {"bert_tokenizer": str(_words_only(tmp_path))}
    trained = open_trained(path, bert)
    assert torch.equal(logits(trained.model), logits(model))
    assert f"BERT's heads {heads}" in trained.summary


def _words_only(folder: Path) -> Path:
    """A folder with a vocabulary, without a configuration."""
    (folder / "words").mkdir()
    for name in ("vocab.txt", "tokenizer_config.json"):
        (folder / "words" / name).write_text((TINY_BERT / name).read_text())
    return folder / "words"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"img_size": -3}, "records img_size '-3': it is damaged"),
        ({"img_size": 10**9}, "records img_size"),
        ({"max_tokens": "20"}, "records max_tokens '20'"),
        ({"dataset": "../../etc"}, "records dataset"),
        ({"splitBy": "a/b"}, "records splitBy"),
        ({"text": "loud"}, "records text 'loud'"),
        ({"mha": 3}, "records mha '3'"),
        ({"swin_type": 5}, "records swin_type '5'"),
        ({"fusion_drop": "x"}, "records fusion_drop"),
        ({"model": "other"}, "records model 'other'"),
        ({"gate": "open"}, "records gate 'open'"),
        ({"mha": ["2"]}, "records mha"),
        ({"mha": "99-1-1-1"}, r"a\.pth: --mha 99-1-1-1"),
        ({"mask_mode": [1]}, "records mask_mode"),
        ({"vocabulary": 5}, "records vocabulary '5'"),
        ({"fusion_drop": 5}, "records fusion_drop '5'"),
        ({"fusion_drop": float("nan")}, "records fusion_drop 'nan'"),
        ({"fusion_drop": 10**400}, "records fusion_drop"),
        ({"window": 10**9}, "records window"),
        ({"img_size": True}, "records img_size 'True'"),
    ],
)
def test_damaged_records(damage: dict[str, Any], says: str, tmp_path: Path) -> None:
    model, args = CASES["lavt"]()
    with pytest.raises(InputError, match=says):
        open_trained(write(record(model, **(args | damage)), tmp_path))


@pytest.mark.parametrize("bert", [5, {}, {"config": {}}, {"config": {}, "tokenizer": b"{}"}])
def test_a_damaged_record_of_bert(bert: Any, tmp_path: Path) -> None:
    model, args = CASES["lavt"]()
    with pytest.raises(InputError, match="its record of BERT is damaged"):
        open_trained(write(record(model, **args) | {"bert": bert}, tmp_path))


@pytest.mark.parametrize("missing", ["mha", "gate", "pwam_norm", "window", "ape", "model"])
def test_a_record_that_lacks_an_entry(missing: str, tmp_path: Path) -> None:
    """What it lacks is told by the weights, or by the user."""
    model, args = CASES["lavt"]()
    args["swin_type"] = "nano"
    left = {k: v for k, v in args.items() if k != missing}
    path = write(record(model, **left), tmp_path)
    trained = open_trained(path, {missing: args[missing]})
    assert torch.equal(logits(trained.model), logits(model))
    if missing in ("window", "ape", "model", "pwam_norm"):
        assert torch.equal(logits(open_trained(path).model), logits(model))


def test_all_that_cannot_be_told_is_asked_for_at_once(tmp_path: Path) -> None:
    model = build("lavt", variant=Variant(fusion="mul", lang_path="off"))
    with pytest.raises(InputError, match=r"--fusion add or mul and --lang_path off"):
        open_trained(write(dict(model.to_published()), tmp_path), {"ck_bert": str(TINY_BERT)})


def test_a_bert_that_is_gone_is_not_needed(tmp_path: Path) -> None:
    model, args = CASES["lavt"]()
    folders = {"ck_bert": "gone/bert", "bert_tokenizer": "gone/bert"}
    path = write(record(model, swin_type="nano", **args, **folders), tmp_path)
    assert torch.equal(logits(open_trained(path, folders).model), logits(model))
    for name in folders:
        with pytest.raises(InputError, match="has its own BERT, leave the flag out; "):
            open_trained(path, {name: str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 1600}, "its text encoder has hidden_size 16, but its record 1600"),
        ({"num_hidden_layers": 200}, "has num_hidden_layers 2, but its record 200"),
        ({"num_attention_heads": 3}, "has 3 heads for a width of 16"),
        ({"vocab_size": "x"}, "record of BERT has vocab_size 'x'"),
    ],
)
def test_a_damaged_text_configuration(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    model, args = CASES["lavt"]()
    content = record(model, **args)
    content["bert"]["config"] |= change
    with pytest.raises(InputError, match=says):
        open_trained(write(content, tmp_path))


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\0", '{"model": null}'])
def test_a_damaged_vocabulary(text: str, tmp_path: Path) -> None:
    model, args = CASES["lavt"]()
    content = record(model, **args)
    content["bert"]["tokenizer"] = text
    with pytest.raises(InputError, match=r"the tokenizer in .*a\.pth is damaged"):
        open_trained(write(content, tmp_path))


def test_a_vocabulary_that_is_not_of_the_weights(tmp_path: Path) -> None:
    model, args = CASES["lavt"]()
    content = record(model, vocabulary="of another", **args)
    with pytest.raises(InputError, match="not those that the weights were trained with"):
        open_trained(write(content, tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "garbage", "another's"])
def test_a_damaged_folder(name: str, damage: str, tmp_path: Path) -> None:
    model, args = CASES["lavt"]()
    trained = open_trained(write(record(model, **args), tmp_path), accelerate=False)
    write_folder(tmp_path / "f", trained, "")
    if damage == "missing":
        (tmp_path / "f" / name).unlink()
    else:
        (tmp_path / "f" / name).write_text("\0garbage" if damage == "garbage" else '{"kind": "x"}')
    with pytest.raises(InputError):
        open_trained(tmp_path / "f")
    if damage == "missing":
        with pytest.raises(InputError, match=f"has no {name}"):
            read_folder(tmp_path / "f")


def test_every_flag_of_the_model_is_recorded(tmp_path: Path) -> None:
    """A flag that a later version adds to the model must be rebuilt, too."""
    trained: Trained = open_trained(write(record(*_plain()), tmp_path))
    assert set(CHOICES) | {"model", "swin_type", "window", "ape", "mha", "fusion_drop"} <= set(
        trained.settings
    )
    assert read_checkpoint(tmp_path / "a.pth")["bert"]["config"]["vocab_size"] == len(TOKENIZER)


def _plain() -> tuple[Segmenter]:
    return (build("lavt_one"),)
