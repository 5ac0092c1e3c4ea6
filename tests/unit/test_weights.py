"""Files of weights as people save them: wrapped, in containers, beside other values."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import pathlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, SwinConfig, SwinForImageClassification, SwinModel

from lib.checkpoint import load_model, read_checkpoint, write_checkpoint
from lib.checkpoint.swin import load_swin_weights
from lib.crossvlt import CrossVLT
from lib.errors import InputError
from lib.model import Segmenter
from lib.weights import unwrap
from tests.conftest import Build
from tests.unit.test_crossvlt import MICRO
from tests.unit.test_pretrained import SIZE, ours, without_language

State = dict[str, Tensor]
PREFIXES = ("_orig_mod.", "module.", "model.", "module._orig_mod.", "_orig_mod.module.model.")


def reversed_copy(model: Segmenter) -> Segmenter:
    """The same model with other weights, so that loading can be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def check_loads(
    content: dict[str, Any], trained: Segmenter, build: Callable[[], Segmenter]
) -> None:
    torch.save(content, "a.pth")
    model = build()
    load_model(model, read_checkpoint("a.pth"), "a.pth")
    truth = trained.state_dict()
    assert all(torch.equal(v, truth[k]) for k, v in model.state_dict().items())


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["lavt", "lavt_one", "crossvlt"])
@pytest.mark.parametrize("prefix", [*PREFIXES, "net.", "student.lavt."])
def test_wrapped_names(name: str, prefix: str, build_nano: Build, text_config: BertConfig) -> None:
    def build() -> Segmenter:
        return CrossVLT(MICRO, 7, text_config) if name == "crossvlt" else build_nano(name)

    trained = reversed_copy(build())
    content = {
        part: {prefix + k: v for k, v in state.items()}
        for part, state in trained.to_published().items()
    }
    check_loads(content, trained, build)


def test_a_compiled_part_and_the_rest_of_a_wrapper(build_nano: Build) -> None:
    trained = reversed_copy(build_nano("lavt_one"))
    state = {
        "model." + k.replace("backbone.", "backbone._orig_mod.module."): v
        for k, v in trained.state_dict().items()
    }
    content = {"state_dict": state | {"loss.weight": torch.ones(2)}, "epoch": 3}
    check_loads(content, trained, lambda: build_nano("lavt_one"))


@pytest.mark.parametrize(
    "container", ["state_dict", "net", "model_state_dict", "model_ema", "teacher", "bare"]
)
def test_containers(container: str, build_nano: Build) -> None:
    trained = reversed_copy(build_nano("lavt_one"))
    state = dict(trained.state_dict())
    content = state if container == "bare" else {container: state, "epoch": 3}
    check_loads(content, trained, lambda: build_nano("lavt_one"))
    two = trained.to_published() if container == "bare" else {container: trained.to_published()}
    check_loads(two, trained, lambda: build_nano("lavt_one"))


def test_two_parts_in_a_container(build_nano: Build) -> None:
    trained = reversed_copy(build_nano("lavt"))
    check_loads({"state_dict": trained.to_published()}, trained, lambda: build_nano("lavt"))


def test_safetensors(build_nano: Build) -> None:
    trained = reversed_copy(build_nano("lavt_one"))
    save_file({f"module.{k}": v for k, v in trained.state_dict().items()}, "a.safetensors")
    model = build_nano("lavt_one")
    load_model(model, read_checkpoint("a.safetensors"), "a.safetensors")
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in model.state_dict().items())


def test_two_prefixes_are_not_guessed(build_nano: Build) -> None:
    state = build_nano("lavt_one").state_dict()
    both = {f"{who}.{k}": v for who in ("teacher", "student") for k, v in state.items()}
    with pytest.raises(InputError, match=r"other names.*teacher\.backbone.*where backbone\."):
        load_model(build_nano("lavt_one"), {"model": both}, "a.pth")


def test_other_names_are_quoted_and_sizes_not_guessed(build_nano: Build) -> None:
    state = {f"encoder_{i}.weight": torch.ones(3, 3) for i in range(4)}
    with pytest.raises(InputError, match=r"encoder_0\.weight where backbone\.") as caught:
        load_model(build_nano(), {"model": state}, "a.pth")
    assert "--swin_type" not in str(caught.value)


def test_unwrap() -> None:
    one = torch.ones(1)
    assert unwrap({"a.b.w": one, "a.b.c.v": one, "loss": one}, ["w", "c.v"]).keys() == {"w", "c.v"}
    assert unwrap({"x.w": one, "y.w": one}, ["w"]).keys() == {"x.w", "y.w"}
    assert unwrap({"new_w": one}, ["w"]).keys() == {"new_w"}  # not below a prefix


# ---- ImageNet Swin ----


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.", "module.", "module.encoder."])
def test_swin_below_a_prefix(prefix: str) -> None:
    source = ours()
    state = {
        swin: v for k, v in source.state_dict().items() if (swin := source.swin_name(k)) is not None
    }
    wrapped = {prefix + k: v for k, v in state.items()}
    if prefix != "module.":
        wrapped["decoder.weight"] = torch.ones(2)  # of the wrapper
    torch.save({"state_dict": wrapped}, "swin.pth")
    model = ours()
    with torch.no_grad():
        model.backbone.patch_embed.proj.weight.zero_()
    load_swin_weights(model, "swin.pth")
    loaded = model.state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in source.state_dict().items() if "norm" not in k)


@pytest.mark.parametrize("kind", ["hub", "in memory", "base model"])
def test_swin_of_transformers(kind: str) -> None:
    """The network with these weights computes what transformers' does."""
    torch.manual_seed(3)
    config = SwinConfig(
        image_size=448,
        embed_dim=SIZE.embed_dim,
        depths=list(SIZE.depths),
        num_heads=list(SIZE.num_heads),
        window_size=7,
        drop_path_rate=0.0,
    )
    theirs = SwinForImageClassification(config).eval()
    if kind == "in memory":
        torch.save(theirs.state_dict(), "swin.pth")
        source = "swin.pth"
    else:
        (theirs if kind == "hub" else theirs.swin).save_pretrained("swin")
        source = "swin/model.safetensors"
    model = ours()
    load_swin_weights(model, source)
    want: list[Tensor] = []
    swin: SwinModel = theirs.swin
    for stage in swin.encoder.layers:
        stage.blocks[-1].register_forward_hook(
            lambda m, a, out: want.append(out[0] if isinstance(out, tuple) else out)
        )
    image = torch.randn(1, 3, 448, 448)
    with torch.no_grad():
        swin(image)
        have = without_language(model.backbone, image)
    for ours_, theirs_ in zip(have, want, strict=True):
        torch.testing.assert_close(
            ours_.flatten(1, 2), theirs_.flatten(1, -2), rtol=1e-4, atol=1e-4
        )


# ---- other values beside the weights ----

NUMPY = {
    "float64": np.float64(0.5),
    "int64": np.int64(3),
    "bool": np.bool_(True),
    "text": np.str_("abc"),
    "array": np.arange(3.0),
    "ints": np.array([[1, 2]], np.int16),
    "words": np.array(["a", "b"]),
    "bytes": np.array([b"a"]),
    "long double": np.longdouble(0.5),
}


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_is_read(name: str, zipped: bool) -> None:
    value = NUMPY[name]
    content = {"model": {"w": torch.ones(1)}, "args": argparse.Namespace(x=value), "y": [value]}
    torch.save(content, "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint("a.pth")
    for found in (read["args"].x, read["y"][0]):
        assert type(found).__module__ in ("builtins", "torch")
        assert np.array_equal(np.asarray(found), value)


def test_numpy_1_names_are_read() -> None:
    torch.save({"model": {"w": torch.ones(1)}, "best": np.float64(0.5)}, "a.pth", pickle_protocol=2)
    with zipfile.ZipFile("a.pth") as old, zipfile.ZipFile("b.pth", "w") as new:
        for item in old.infolist():
            part = old.read(item).replace(b"numpy._core.", b"numpy.core.")
            new.writestr(item.filename, part)
    assert read_checkpoint("b.pth")["best"] == 0.5


def test_weights_as_arrays(build_nano: Build) -> None:
    trained = reversed_copy(build_nano("lavt_one"))
    content = {"model": {k: v.numpy() for k, v in trained.state_dict().items()}}
    check_loads(content, trained, lambda: build_nano("lavt_one"))


def test_a_dead_loader_process_is_not_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(content: Any, file: Any) -> None:
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(RuntimeError, match="killed by signal"):
        write_checkpoint({"epoch": 1}, "a.pth")
    assert not list(Path().iterdir())


class Config(dict):  # type: ignore[type-arg]
    """Like a configuration object of another code."""


OTHERS: dict[str, Any] = {
    "PurePosixPath": pathlib.PurePosixPath("a/b"),
    "Config": Config(a=1),
    "defaultdict": collections.defaultdict(dict),
    "datetime": datetime.datetime(2024, 1, 1),
    "frozenset": frozenset({1}),
    "range": range(3),
}


def weights() -> State:
    return {"w": torch.ones(1), "v": torch.ones(2)}


PLACES: dict[str, Callable[[Any], Any]] = {
    "c['kept']": lambda other: {"model": weights(), "kept": other, "epoch": 3},
    "c['args']['kept']": lambda other: {"model": weights(), "args": {"lr": 0.1, "kept": other}},
    "c['hist'][2]": lambda other: {"model": weights(), "hist": ["x", "y", other]},
    "c[3]": lambda other: {"model": weights(), 3: other},
    "c['args'].kept": lambda other: {"model": weights(), "args": argparse.Namespace(kept=other)},
    "c['t'][1]": lambda other: {"model": weights(), "t": (1, other)},
    "c['model']['cfg']": lambda other: {"model": weights() | {"cfg": other}},
}


def follow(message: str) -> None:
    """Do what a message says."""
    exec(message.split("save it again: ")[1], {"torch": torch})


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("zipped", [True, False])
def test_another_object_is_named_and_can_be_left_out(name: str, place: str, zipped: bool) -> None:
    content = PLACES[place](OTHERS[name])
    torch.save(content, "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError) as caught:
        read_checkpoint("a.pth")
    message = str(caught.value)
    assert name in message
    assert f"in {place}," in message
    assert "authors" not in message
    follow(message)
    read = read_checkpoint("plain.pth")
    assert torch.equal(read["model"]["v"], torch.ones(2))


@pytest.mark.parametrize("protocol", [4, 5])
def test_another_object_in_another_protocol(protocol: int) -> None:
    torch.save({"model": weights(), "kept": Config()}, "a.pth", pickle_protocol=protocol)
    with pytest.raises(InputError, match=r"in c\['kept'\],") as caught:
        read_checkpoint("a.pth")
    follow(str(caught.value))
    assert read_checkpoint("plain.pth").keys() == {"model"}


@pytest.mark.parametrize("held", ["whole", "model", "net"])
def test_a_network_object(held: str, build_nano: Build) -> None:
    model = build_nano("lavt_one")
    torch.save(model if held == "whole" else {held: model, "epoch": 1}, "a.pth")
    with pytest.raises(InputError, match=r"c = torch\.load") as caught:
        read_checkpoint("a.pth")
    follow(str(caught.value))
    load_model(build_nano("lavt_one"), read_checkpoint("plain.pth"), "plain.pth")


def test_stand_ins_run_nothing() -> None:
    """Looking for the key of an object does not make the object."""

    class Runs:
        def __reduce__(self) -> Any:
            return (Path.touch, (Path("ran"),))

    torch.save({"model": weights(), "kept": [Runs()]}, "a.pth")
    with pytest.raises(InputError, match=r"c\['kept'\]\[0\]"):
        read_checkpoint("a.pth")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"", "damaged or no PyTorch checkpoint"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_what_is_no_file_of_weights(start: bytes, said: str, name: str) -> None:
    Path(name).write_bytes(start)
    with pytest.raises(InputError, match="damaged or no" if not start else said):
        read_checkpoint(name)


def test_safetensors_of_another_name() -> None:
    save_file(weights(), "a.pth")
    assert read_checkpoint("a.pth").keys() == {"w", "v"}


def test_ordered_and_empty() -> None:
    inner = collections.OrderedDict(w=np.ones(2))
    torch.save(collections.OrderedDict(model=inner, epoch=np.int64(1), hist=np.empty(0)), "a.pth")
    read = read_checkpoint("a.pth")
    assert type(read["epoch"]) is int
    assert torch.equal(read["model"]["w"], torch.ones(2, dtype=torch.float64))
    assert len(read["hist"]) == 0


@pytest.mark.parametrize("kind", ["objects", "structure"])
def test_an_array_of_objects_is_named(kind: str) -> None:
    """And nothing of it runs."""
    plain = np.ones(2)
    other = np.array([Config()], object) if kind == "objects" else np.zeros(2, [("a", "i4")])
    torch.save({"model": weights(), "plain": plain, "hist": {"x": other}}, "a.pth")
    with pytest.raises(InputError, match=r"in c\['hist'\]\['x'\],") as caught:
        read_checkpoint("a.pth")
    follow(str(caught.value))
    assert read_checkpoint("plain.pth").keys() == {"model", "plain", "hist"}


def test_damaged_arrays_are_errors_of_input() -> None:
    """NumPy's own functions would end the process at some of these."""
    values = {"a": np.float64(3), "b": np.arange(3.0), "c": np.array(["x"]), "d": np.longdouble(1)}
    torch.save({"model": weights(), **values}, "a.pth", _use_new_zipfile_serialization=False)
    whole = Path("a.pth").read_bytes()
    first = whole.index(b"numpy")
    for place in range(first, min(len(whole), first + 1200)):
        for mask in (0xFF, 0x01):
            broken = whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]
            Path("b.pth").write_bytes(broken)
            with contextlib.suppress(InputError):  # and no other exception
                read_checkpoint("b.pth")
