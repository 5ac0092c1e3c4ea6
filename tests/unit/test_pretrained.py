"""ImageNet Swin weights in every layout, and agreement with timm's Swin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from transformers import BertConfig

from lib.backbone import MultiModalSwin
from lib.checkpoint.swin import load_swin_weights
from lib.errors import InputError
from lib.lavt import LAVT, build_lavt
from lib.swin import SwinSize

SIZE = SwinSize(8, (2, 2, 2, 2), (1, 2, 4, 8))
State = dict[str, Tensor]


TEXT = BertConfig(
    vocab_size=10,
    hidden_size=6,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=8,
)


def ours(window: int = 7, ape_grid: int = 0, size: SwinSize = SIZE) -> LAVT:
    torch.manual_seed(1)
    options = {"ape_grid": ape_grid, "text_dropout": False, "separate_text": True}
    return build_lavt(size, window, TEXT, **options).eval()  # type: ignore[arg-type]


def of_timm(window: int = 7, image_size: int = 448) -> SwinTransformer:
    """A random classifier; at 448 pixels its last map is 14x14, larger than a window of 7.

    On smaller images timm shrinks the window to the map and drops the shift, and differs.
    """
    torch.manual_seed(2)
    model = SwinTransformer(
        img_size=image_size,
        window_size=window,
        embed_dim=SIZE.embed_dim,
        depths=SIZE.depths,
        num_heads=SIZE.num_heads,
        num_classes=10,
    )
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim == 1 or "table" in name else 0.1
        nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, scale)
    return model.eval()


def official(state: State, window: int = 7) -> State:
    """The Swin release's layout: merging at the tail of a stage, buffers stored, a plain head."""
    out = {}
    for key, value in state.items():
        parts = key.split(".")
        if len(parts) > 2 and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        out[".".join(parts).replace("head.fc.", "head.")] = value
    for i in range(4):
        for j in range(2):
            block = f"layers.{i}.blocks.{j}"
            index = torch.zeros(window**2, window**2, dtype=torch.int64)
            out[f"{block}.attn.relative_position_index"] = index
            if j:
                out[f"{block}.attn_mask"] = torch.zeros(4, window**2, window**2)
    return out


@pytest.fixture(scope="module")
def timm_model() -> SwinTransformer:
    return of_timm()


def write(layout: str, state: State, folder: Path) -> Path:
    path = folder / f"swin_{layout}.{'safetensors' if 'safetensors' in layout else 'pth'}"
    arranged = state if layout.startswith("timm") else official(state)
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in arranged.items()}, path)
    else:
        torch.save(arranged if "bare" in layout else {"model": arranged}, path)
    return path


LAYOUTS = [
    "official_in_model",
    "official_bare",
    "official_safetensors",
    "timm_in_model",
    "timm_bare",
    "timm_safetensors",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, timm_model: SwinTransformer, tmp_path: Path) -> None:
    state = timm_model.state_dict()
    model = ours()
    backbone = model.backbone
    fresh = {k: v.clone() for k, v in backbone.state_dict().items() if ".fusion." in k}
    summary = load_swin_weights(model, str(write(layout, state, tmp_path)))
    own = backbone.state_dict()
    wanted = {k: v for k, v in official(state).items() if k in own and "index" not in k}
    assert len(wanted) == 4 + 8 * 13 + 3 * 3
    assert all(torch.equal(own[k], v) for k, v in wanted.items())
    assert all(torch.equal(own[k], v) for k, v in fresh.items())
    assert f"{len(wanted)} loaded, 0 of them resized" in summary
    if layout.startswith("timm"):
        assert "4 ignored (head, norm)" in summary
    else:
        assert "16 ignored (attn_mask, head, norm, relative_position_index)" in summary
    assert f"{len(fresh) + 8 + 8} others keep their initial values" in summary
    # The index is ours, not the file's zeros.
    assert own["layers.0.blocks.0.attn.relative_position_index"].max() == 13**2 - 1


def without_language(backbone: MultiModalSwin, image: Tensor) -> list[Tensor]:
    """What leaves each stage's blocks, (B, H, W, C), with the gates shut."""
    stages: list[Any] = list(backbone.layers)
    for stage in stages:
        nn.init.zeros_(stage.res_gate[2].weight)  # tanh(0) = 0: nothing is added
    seen: list[Tensor] = []
    hooks = [
        stage.blocks[-1].register_forward_hook(lambda m, a, output: seen.append(output))
        for stage in stages
    ]
    dtype = image.dtype
    backbone(image, torch.zeros(1, 3, 6, dtype=dtype), torch.ones(1, 3, dtype=dtype))
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_features_equal_timms(timm_model: SwinTransformer, tmp_path: Path) -> None:
    model = ours()
    backbone = model.backbone
    load_swin_weights(model, str(write("official_in_model", timm_model.state_dict(), tmp_path)))
    image = torch.randn(1, 3, 448, 448)
    x = timm_model.patch_embed(image)
    for stage, result in zip(timm_model.layers, without_language(backbone, image), strict=True):
        x = stage(x)  # merging first, then the blocks
        assert x.shape == result.shape
        assert result.std() > 0.1
        torch.testing.assert_close(result, x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_on_a_small_image_timm_shrinks_the_window_and_we_do_not() -> None:
    """Why a published LAVT cannot be run on timm's Swin: at 56 pixels maps are 14, 7, 4, 2."""
    classifier, backbone = of_timm(image_size=56), ours().backbone
    state = official(classifier.state_dict())
    own = backbone.state_dict()
    fits = [k for k, v in state.items() if k in own and v.shape == own[k].shape]
    same = {k: state[k] for k in fits if not k.endswith("index")}
    backbone.load_state_dict(same, strict=False)
    image = torch.randn(1, 3, 56, 56)
    x, agree = classifier.patch_embed(image), []
    for stage, result in zip(classifier.layers, without_language(backbone, image), strict=True):
        x = stage(x)
        agree.append(torch.allclose(result, x, atol=1e-4))
    assert agree == [True, False, False, False]


def bicubic(table: Tensor, side: int) -> Tensor:
    """One head at a time, on the (2w-1, 2w-1) grid of offsets."""
    old = round(table.shape[0] ** 0.5)
    heads = [
        F.interpolate(head.view(1, 1, old, old), size=(side, side), mode="bicubic").flatten()
        for head in table.unbind(1)
    ]
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize(("held", "wanted"), [(7, 12), (12, 7)])
def test_window_tables_are_resized(held: int, wanted: int, tmp_path: Path) -> None:
    state = of_timm(held, image_size=32 * 2 * held).state_dict()
    torch.save({"model": official(state, held)}, tmp_path / "swin.pth")
    model = ours(wanted)
    backbone = model.backbone
    summary = load_swin_weights(model, str(tmp_path / "swin.pth"))
    assert "8 of them resized" in summary
    key = "layers.2.blocks.1.attn.relative_position_bias_table"
    table = backbone.state_dict()[key]
    assert table.shape == ((2 * wanted - 1) ** 2, 4)
    torch.testing.assert_close(table, bicubic(state[key], 2 * wanted - 1))
    # The offset (0, 0) is in the middle of both grids, where bicubic interpolation is exact.
    middle = state[key].shape[0] // 2
    torch.testing.assert_close(table[table.shape[0] // 2], state[key][middle])


def test_absolute_position_is_resized(timm_model: SwinTransformer, tmp_path: Path) -> None:
    state = official(timm_model.state_dict())
    state["absolute_pos_embed"] = torch.randn(1, 36, SIZE.embed_dim)  # (1, tokens, C) there
    torch.save({"model": state}, tmp_path / "swin.pth")
    model = ours(ape_grid=9)
    backbone = model.backbone
    assert "1 of them resized" in load_swin_weights(model, str(tmp_path / "swin.pth"))
    grid = state["absolute_pos_embed"].view(1, 6, 6, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(9, 9), mode="bicubic")
    torch.testing.assert_close(backbone.state_dict()["absolute_pos_embed"], expected)


def damaged(state: State, what: str) -> Any:
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    changes: dict[str, Any] = {
        "missing": {k: v for k, v in state.items() if k != "layers.1.blocks.0.norm1.bias"},
        "unknown": state | {"layers.1.blocks.7.norm1.bias": torch.zeros(3)},
        "other width": state | {"patch_embed.proj.bias": torch.zeros(16)},
        "other heads": state | {key: torch.zeros(169, 2)},
        "table not square": state | {key: torch.zeros(168, 1)},
        "table a scalar": state | {key: torch.zeros(())},
        "position without ours": state | {"absolute_pos_embed": torch.zeros(1, 36, 8)},
        "no tensors": {"model": {"a": 1}},
        "a number": {"model": 3},
        "empty": {"model": {}},
        "list": [1],
    }
    return changes[what]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"1 weights missing \['layers.1.blocks.0.norm1.bias'\].*the names differ"),
        ("unknown", r"1 unknown \['layers.1.blocks.7.norm1.bias'\].*--swin_type"),
        ("other width", r"patch_embed.proj.bias is \(16,\), not \(8,\).*--swin_type"),
        ("other heads", r"bias_table is \(169, 2\), not \(169, 1\)"),
        ("table not square", r"bias_table is \(168, 1\)"),
        ("table a scalar", r"bias_table is \(\), not"),
        ("position without ours", r"has a position embedding: give --ape \d"),
        ("no tensors", "holds no Swin weights"),
        ("a number", "holds no Swin weights"),
        ("empty", "holds no Swin weights"),
        ("list", "holds a list"),
    ],
)
def test_what_is_unexplained_is_one_clear_line(
    what: str, message: str, timm_model: SwinTransformer, tmp_path: Path
) -> None:
    torch.save(damaged(official(timm_model.state_dict()), what), tmp_path / "swin.pth")
    model = ours()
    backbone = model.backbone
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        load_swin_weights(model, str(tmp_path / "swin.pth"))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize("source", ["no/such/swin.pth", "none.pth", "none.safetensors"])
def test_missing_file(source: str) -> None:
    with pytest.raises(InputError, match="no checkpoint at"):
        load_swin_weights(ours(), source)


def test_a_trained_model_is_no_imagenet_swin(tmp_path: Path) -> None:
    torch.save(ours().to_published(), tmp_path / "lavt.pth")
    with pytest.raises(InputError, match=r"trained model, not an ImageNet Swin.*--init_from"):
        load_swin_weights(ours(), str(tmp_path / "lavt.pth"))


def test_output_norms_of_a_detector(timm_model: SwinTransformer, tmp_path: Path) -> None:
    state = {f"backbone.{k}": v for k, v in official(timm_model.state_dict()).items()}
    state |= {f"backbone.norm{i}.weight": torch.ones(8 << i) for i in range(4)}
    torch.save({"state_dict": state | {"neck.w": torch.ones(1)}}, tmp_path / "swin.pth")
    assert "0 of them resized" in load_swin_weights(ours(), str(tmp_path / "swin.pth"))


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="neither a file nor a model known to timm"):
        load_swin_weights(ours(), "swin_of_nobody")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224.x"])
def test_name_of_a_timm_model(
    name: str, timm_model: SwinTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def create(source: str, pretrained: bool) -> SwinTransformer:
        asked.append((source, pretrained))
        return timm_model

    monkeypatch.setattr(timm, "create_model", create)
    assert f"Swin weights of {name}: " in load_swin_weights(ours(), name)
    assert asked == [(name, True)]


@pytest.mark.parametrize("error", [OSError("offline"), RuntimeError("Invalid pretrained tag\nx")])
def test_timm_without_network(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(source: str, pretrained: bool) -> nn.Module:
        raise error

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(InputError, match="could not get") as caught:
        load_swin_weights(ours(), "swin_tiny_patch4_window7_224")
    assert str(error).splitlines()[0] in str(caught.value)
    assert "\n" not in str(caught.value)
