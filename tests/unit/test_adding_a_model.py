"""docs/adding_a_model.md: one class and one line make a model of train.py and test.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import test as test_script
import train as train_script
from bert import build_text_encoder
from data.refshapes.generate import generate
from lib import segmentation
from lib.mask_predictor import upsample
from lib.model import Segmenter, decay_group, fill_text
from lib.segmentation import Entry
from lib.swin import PatchEmbed, SwinSize, swin_blocks
from tests.scripts import Shapes


class Toy(Segmenter):
    """One Swin stage, multiplied by the features of [CLS]."""

    groups = ("backbone_no_decay", "backbone", "decoder", "text")

    def __init__(
        self,
        size: SwinSize,
        window_size: int,
        text_config: BertConfig,
        *,
        drop_path: float = 0.0,
        ape_grid: int = 0,
    ) -> None:
        super().__init__()
        dim = size.embed_dim
        self.backbone = nn.ModuleDict(
            {
                "patch_embed": PatchEmbed(4, dim),
                "blocks": swin_blocks(dim, 2, 2, window_size, [0.0, drop_path]),
            }
        )
        self.classifier = nn.Linear(dim, 2)
        self.text_encoder = build_text_encoder(text_config)
        self.project = nn.Linear(text_config.hidden_size, dim)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        lang = self.text_encoder(input_ids, attention_mask).last_hidden_state[:, 0]
        x = self.backbone["patch_embed"](image)
        for block in self.backbone["blocks"]:
            x = block(x)
        x = self.classifier(x * self.project(lang)[:, None, None])
        return upsample(x.permute(0, 3, 1, 2), image.shape[-2:])

    def parameter_group(self, name: str, lang_layers: int | None) -> str | None:
        part = name.split(".")[0]
        if part == "backbone":
            return decay_group(name)
        return "text" if part == "text_encoder" else "decoder"

    def unused_parameters(self) -> dict[str, str]:
        return {}

    def swin_name(self, name: str) -> str | None:
        return None

    def load_text(self, bert: BertModel) -> None:
        fill_text(self.text_encoder, bert)


def test_a_new_model_trains_and_is_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path / "data", scenes=6, val_scenes=2, test_scenes=1)
    shapes = Shapes(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(segmentation.MODELS, "toy", Entry(Toy, max_tokens=12, lr=1e-3))
    train_script.main([*shapes.train_options, "--model", "toy", "--epochs", "1"])
    content = torch.load("checkpoints/model_last_lavt.pth", weights_only=True)
    assert content["args"]["max_tokens"] == 12
    options = ["--model", "toy", "--resume", "checkpoints/model_last_lavt.pth", "--split", "val"]
    test_script.main([*shapes.options, *options, "--results", "results.json"])
    assert json.loads(Path("results.json").read_text())["splits"]["val"]["all"]["samples"] > 0
