"""Word-pixel attention of the models, and its figure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lib.attention import (
    GREYS,
    MAX_WIDTH,
    OPACITY,
    SCALE,
    attention_figure,
    colors,
    fusions,
    join_pieces,
    whole_words,
    word_attention,
)
from lib.errors import InputError
from lib.model import Segmenter
from lib.variants import Variant
from tests.conftest import Build

SIZES = [(16, 18), (8, 9), (4, 5), (2, 3)]  # of an image of 64 x 72


def batch() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    ids = torch.randint(1, 60, (2, 6), generator=g)
    return torch.randn(2, 3, 64, 72, generator=g, dtype=torch.float64), ids, mask


def double(build_nano: Build, name: str = "lavt", **options: object) -> Segmenter:
    torch.manual_seed(0)
    return build_nano(name, **options).double().eval()


def recorded(model: Segmenter) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """What goes into and comes out of each stage's attention."""
    calls: list[tuple[tuple[Tensor, ...], Tensor]] = []
    result = [getattr(m, "image_lang_att", m) for m in fusions(model)]
    hooks = [m.register_forward_hook(lambda m, i, o: calls.append((i, o))) for m in result]
    with torch.no_grad():
        model(*batch())
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("name", ["lavt", "lavt_one", "crossvlt"])
def test_sums_to_one_over_words_and_padding_gets_none(build_nano: Build, name: str) -> None:
    options = {"swin_type": "micro"} if name == "crossvlt" else {"mha": "2-4-4-8"}
    model = double(build_nano, name, **options)
    before = model(*batch())
    maps = word_attention(model, *batch())
    assert [m.shape for m in maps] == [(2, 6, *size) for size in SIZES]
    for m in maps:
        torch.testing.assert_close(m.sum(1), torch.ones_like(m[:, 0]))
        assert not m[1, 4:].any()
        assert (m[0] > 0).all()
        assert not m.requires_grad
    assert torch.equal(model(*batch()), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def conv(layer: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution of (B, T, C), by PyTorch's own on (B, C, T)."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    return F.conv1d(x.mT, weight, bias)


@pytest.mark.parametrize("mha", ["", "1-2-4-8"])
def test_lavts_is_the_papers(build_nano: Build, mha: str) -> None:
    """softmax(q k^T / sqrt(C)), and with the values it gives what the module gives."""
    model = double(build_nano, mha=mha)
    maps, calls = word_attention(model, *batch()), recorded(model)
    for module, result, ((vis, lang, mask), out) in zip(fusions(model), maps, calls, strict=True):
        att = module.get_submodule("image_lang_att")
        heads, (B, HW, C) = att.num_heads, vis.shape
        m = mask[:, None].double()
        query = F.instance_norm(conv(att.f_query[0], vis)).view(B, heads, C // heads, HW)
        key = (conv(att.f_key[0], lang) * m).view(B, heads, C // heads, -1)
        value = (conv(att.f_value[0], lang) * m).view(B, heads, C // heads, -1)
        weights = (query.mT @ key / C**0.5 + (1e4 * m - 1e4)[:, None]).softmax(-1)
        expected = weights.mean(1).mT.reshape(result.shape)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
        gathered = (weights @ value.mT).mT.reshape(B, C, HW)
        by_paper = F.instance_norm(conv(att.W[0], gathered.mT)).mT
        torch.testing.assert_close(out, by_paper, rtol=0, atol=1e-9)
        if heads == 1:  # the maps themselves are what gathers the values
            again = result.flatten(2).mT @ value[:, 0].mT
            torch.testing.assert_close(again.mT, gathered, rtol=0, atol=1e-12)


def test_crossvlts_is_its_papers(build_nano: Build) -> None:
    model = double(build_nano, "crossvlt", swin_type="micro")
    maps, calls = word_attention(model, *batch()), recorded(model)
    for att, result, ((vis, lang, mask), out) in zip(fusions(model), maps, calls, strict=True):
        tokens, B = vis.flatten(1, 2), len(vis)
        query = F.instance_norm(conv(att.v_q[0], tokens)).view(B, -1, 64, tokens.shape[1])
        key = att.l_q(lang).mT.reshape(B, -1, 64, lang.shape[1])
        value = att.values_l(lang).mT.reshape(B, -1, 64, lang.shape[1])
        logits = query.mT @ key / 8 + (1e4 * mask - 1e4)[:, None, None]
        weights = logits.softmax(-1)
        expected = weights.mean(1).mT.reshape(result.shape)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
        gathered = (weights @ value.mT).transpose(1, 2).flatten(2)
        fused = att.project_mm(tokens + att.w_v(gathered)).view_as(vis)
        torch.testing.assert_close(out, fused, rtol=0, atol=1e-9)


def test_forms_without_it_say_so(build_nano: Build) -> None:
    model = double(build_nano, variant=Variant(fusion="add"))
    with pytest.raises(InputError, match=r"no attention to words to show \(fusion 'add'\)"):
        word_attention(model, *batch())
    alone = double(build_nano, variant=Variant(pwam_attention="sigmoid"))
    maps = word_attention(alone, *batch())
    assert all(((m >= 0) & (m <= 1)).all() and not m[1, 4:].any() for m in maps)


def test_a_failing_model_keeps_no_hooks(build_nano: Build) -> None:
    model, (image, ids, mask) = double(build_nano), batch()
    with pytest.raises(RuntimeError):
        word_attention(model, image[:, :1], ids, mask)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_pieces_of_a_word_share_a_column() -> None:
    pieces = ["[CLS]", "the", "ze", "##bra", "##s", "##x", "[SEP]"]
    words = [("[CLS]", [0]), ("the", [1]), ("zebrasx", [2, 3, 4, 5]), ("[SEP]", [6])]
    assert whole_words(pieces) == words
    assert whole_words(["##a", "[CLS]", "##b"]) == [("##a", [0]), ("[CLS]", [1]), ("##b", [2])]


def test_colours_grow_brighter() -> None:
    rgb = colors(np.linspace(0, 1, 64))
    assert tuple(rgb[0]) == SCALE[0]
    assert tuple(rgb[-1]) == SCALE[-1]
    luminance = rgb @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()


def figure(size: tuple[int, int], pieces: list[str], maps: list[np.ndarray]) -> Image.Image:
    image_file = Image.new("RGB", size, (10, 200, 10))
    prediction = Image.new("RGB", size, (250, 10, 10))
    words, joined = join_pieces(pieces, maps)
    return attention_figure(image_file, prediction, words, joined, "a sentence")


def shows(img: Image.Image, color: tuple[float, ...]) -> int:
    """Pixels of about a colour."""
    return int((np.abs(np.asarray(img) - np.array(color)).max(-1) <= 2).sum())


def blended(value: float, grey: int) -> tuple[float, ...]:
    low, high = GREYS
    image_file = low + (high - low) * grey // 255
    return tuple((1 - OPACITY) * image_file + OPACITY * c for c in colors(np.array(value)))


def test_the_figure_shows_the_weights() -> None:
    """A word with all of the weight, a word of two pieces with a quarter, one without any."""
    size, pieces = (200, 150), ["[CLS]", "a", "##b", "c"]
    weights = np.array([0.75, 0.125, 0.125, 0.0], np.float32)[:, None, None]
    maps = [np.broadcast_to(weights, (4, 12 // n, 16 // n)) for n in (1, 2, 4, 4)]
    drawn = figure(size, pieces, maps)
    tile = size[0] * size[1]
    grey = Image.new("RGB", (1, 1), (10, 200, 10)).convert("L").getpixel((0, 0))
    assert isinstance(grey, int)
    for value in (1.0, 1 / 3, 0.0):  # of the largest, 0.75
        assert 4 * tile <= shows(drawn, blended(value, grey)) < 4.1 * tile
    assert shows(drawn, (10, 200, 10)) >= 2 * tile  # the image, larger than a tile
    assert shows(drawn, (250, 10, 10)) >= 2 * tile


@pytest.mark.parametrize(
    ("size", "words"),
    [((640, 480), 3), ((640, 480), 20), ((3, 900), 2), ((1, 1), 4), ((4000, 8), 2)],
)
def test_figures_of_any_shape(size: tuple[int, int], words: int) -> None:
    maps = [np.full((words, 4, 4), 1 / words, np.float32) for _ in range(4)]
    drawn = figure(size, [f"w{i}" for i in range(words)], maps)
    assert drawn.mode == "RGB"
    assert drawn.width <= 1.1 * MAX_WIDTH
    assert np.asarray(drawn).std() > 0
    assert figure(size, ["w"] * words, [0 * m for m in maps]).size == drawn.size  # nothing at all
