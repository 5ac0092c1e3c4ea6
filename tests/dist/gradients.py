"""Started by torchrun from test_ddp.py: one backward pass under DDP, gradients to a file."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import BertConfig

import utils
from lib.losses import cross_entropy
from lib.model import Objective, Segmenter
from lib.runtime import compile_module
from lib.segmentation import build_model
from lib.training import optim, steps
from lib.training.maskris import MaskRIS
from lib.training.methods import Methods
from lib.training.steps import StepOptions, total_loss
from lib.variants import Variant
from utils import wrap_ddp

TWO_PASSES = " maskris"
MASKRIS = MaskRIS(Methods(maskris_patch=8), mask_id=4, special_ids=(0,), vocabulary=60)


def model(name: str) -> Segmenter:
    """A small model whose every parameter differs from zero, the same in every process.

    Its variant follows the name: 'lavt gate=off decoder_features=V'; MaskRIS ends it.
    """
    name, *changes = name.removesuffix(TWO_PASSES).split()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    built = build_model(
        name,
        swin_type="micro",
        window_size=7,
        text_config=config,
        drop_path=0.0,
        variant=Variant(**dict(change.split("=") for change in changes)),
    )
    optim.freeze_unused(built, optim.parameter_groups(built, 0.01, lang_layers=2))
    return built.double().train()


def shard(rank: int) -> dict[str, torch.Tensor]:
    """The batch of a process: two samples of its own."""
    g = torch.Generator().manual_seed(100 + rank)
    image = torch.randn(2, 3, 56, 56, generator=g, dtype=torch.float64)
    ids = torch.randint(1, 60, (2, 8), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    target = (torch.rand(2, 56, 56, generator=g) > 0.7).long()
    return {"image": image, "input_ids": ids, "attention_mask": mask, "target": target}


def gradients(
    name: str, rank: int, info: utils.DistInfo | None = None, backend: str = ""
) -> dict[str, torch.Tensor]:
    """Gradients of a backward pass on a process' batch; under DDP where ``info`` is given.

    With a backend of torch.compile another batch comes first; compiling again is an error.
    """
    bare = model(name)
    twice = name.endswith(TWO_PASSES)
    objective: torch.nn.Module = (MASKRIS.objective if twice else Objective)(bare, cross_entropy)
    if backend:
        compile_module(objective, backend)
    if info is not None:
        objective = wrap_ddp(objective, info)
    if backend:
        total_loss(objective(shard(1 - rank))).backward()
        bare.zero_grad()
        torch.compiler.set_stance("fail_on_recompile")
    if twice:
        torch.manual_seed(rank)  # of the masks
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        options = StepOptions(maskris=MASKRIS)
        with patch.object(steps, "prepare_batch", lambda batch, device: batch):  # is prepared
            steps._backward(objective, [shard(rank)], torch.device("cpu"), options, scaler)
    else:
        total_loss(objective(shard(rank))).backward()
    return {n: p.grad.clone() for n, p in bare.named_parameters() if p.grad is not None}


def main() -> None:
    name, folder, *backend = sys.argv[1:]
    info = utils.init_distributed("cpu")
    torch.save(gradients(name, info.rank, info, *backend), Path(folder) / f"rank{info.rank}.pt")
    utils.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
