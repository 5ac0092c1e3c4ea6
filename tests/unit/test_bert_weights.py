"""BERT's weights as their files really are; what does not arrive stops the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, BertModel

from bert import build_text_encoder, hub, load_bert
from lib.errors import InputError

TINY_BERT = Path(__file__).parents[1] / "fixtures" / "tiny_bert"
State = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a configuration and a vocabulary, and no weights."""
    made = tmp_path / "bert"
    shutil.copytree(TINY_BERT, made)
    for name in ("pytorch_model.bin", "model.safetensors"):
        (made / name).unlink(missing_ok=True)
    return made


@pytest.fixture
def state(folder: Path) -> State:
    """Complete weights of the configuration, pooler included."""
    torch.manual_seed(3)
    model = BertModel(BertConfig.from_pretrained(folder))
    return {k: torch.randn_like(v) for k, v in model.state_dict().items() if v.is_floating_point()}


def check_loaded(folder: Path, state: State) -> None:
    loaded = load_bert(folder)
    assert not loaded.training
    own = loaded.state_dict()
    assert own.keys() == {k for k in state if not k.startswith("pooler.")}
    assert all(torch.equal(v, state[k]) for k, v in own.items())


def old_names(state: State) -> State:
    return {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in state.items()
    }


HEADS = {"cls.predictions.bias": torch.zeros(3), "cls.seq_relationship.weight": torch.zeros(2, 3)}
FORMS: dict[str, Callable[[State], State]] = {
    "plain": dict,
    "first names": old_names,
    "bert.": lambda s: {f"bert.{k}": v for k, v in old_names(s).items()} | HEADS,
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "_orig_mod.module.bert.": lambda s: {f"_orig_mod.module.bert.{k}": v for k, v in s.items()},
    "any prefix": lambda s: {f"0.auto_model.{k}": v for k, v in s.items()},
    "position_ids": lambda s: s | {"embeddings.position_ids": torch.arange(9)[None]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_forms(form: str, kind: str, folder: Path, state: State) -> None:
    content = {k: v.clone() for k, v in FORMS[form](state).items()}
    if kind == "bin":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        save_file(content, folder / "model.safetensors", {"format": "pt"})
    check_loaded(folder, state)


@pytest.mark.parametrize("container", ["state_dict", "model", "bert_model"])
def test_containers(container: str, folder: Path, state: State) -> None:
    torch.save({container: state, "epoch": 1}, folder / "pytorch_model.bin")
    check_loaded(folder, state)


def test_what_transformers_saves(folder: Path) -> None:
    model = BertForPreTraining(BertConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    check_loaded(folder, {k: v for k, v in model.bert.state_dict().items() if "_ids" not in k})


@pytest.mark.parametrize(
    "name",
    ["embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.weight"],
)
def test_a_missing_weight_stops(name: str, folder: Path, state: State) -> None:
    del state[name]
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=f"lacks 1 of BERT's .* weights: {name}") as caught:
        load_bert(folder)
    assert "--ck_bert" in str(caught.value)


def test_two_networks_in_a_file_are_not_guessed(folder: Path, state: State) -> None:
    both = {f"{who}.{k}": v for who in ("query", "key") for k, v in state.items()}
    torch.save(both, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"lacks 37 .*it has query\.embeddings"):
        load_bert(folder)


def test_fewer_layers_or_another_width_than_configured(folder: Path, state: State) -> None:
    torch.save({k: v for k, v in state.items() if ".layer.1." not in k}, folder / "x.bin")
    (folder / "x.bin").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"lacks 16 .*encoder\.layer\.1\."):
        load_bert(folder)
    key = "embeddings.word_embeddings.weight"
    torch.save(state | {key: torch.zeros(5, 7)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"word_embeddings.weight is \(5, 7\), but .*config\.json"):
        load_bert(folder)


def test_more_layers_than_configured(folder: Path, state: State) -> None:
    more = {k.replace(".1.", ".2."): v for k, v in state.items() if ".layer.1." in k}
    torch.save(state | more, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"more layers than the config\.json"):
        load_bert(folder)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "tf_model.h5"])
def test_weights_in_another_form_are_named(name: str, folder: Path) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(InputError, match=f"no model.safetensors but {name}: save it again"):
        load_bert(folder)


def test_integers_are_no_weights(folder: Path, state: State) -> None:
    torch.save({k: v.to(torch.int8) for k, v in state.items()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"is of type torch\.int8"):
        load_bert(folder)


def test_no_weights_at_all(folder: Path) -> None:
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds no weights of a BERT"):
        load_bert(folder)


def test_half_precision_becomes_single(folder: Path, state: State) -> None:
    torch.save({k: v.half() for k, v in state.items()}, folder / "pytorch_model.bin")
    loaded = load_bert(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    build_text_encoder(folder).load_state_dict(loaded.state_dict())  # strictly


def test_a_name_of_the_hub(folder: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file name is asked for where the first one is not there."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    torch.save(state, folder / "pytorch_model.bin")
    asked = []

    def download(name: str, file: str, local_files_only: bool) -> str:
        asked.append((name, file, local_files_only))
        if file == "model.safetensors":
            raise LocalEntryNotFoundError("not in the cache")
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    files = ("model.safetensors", "pytorch_model.bin")
    assert hub.file_of("some/bert", files, True) == str(folder / "pytorch_model.bin")
    assert asked == [("some/bert", file, True) for file in files]
    with pytest.raises(InputError, match="has no model"):
        hub.file_of("some/bert", files[:1], True)
