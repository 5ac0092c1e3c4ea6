"""Started by torchrun from test_runs.py: gradients and a training step under DDP, on each GPU.

With NCCL, batch norms are synchronised: the gradient is that of the batch of all processes, and so
are the statistics. A rehearsal (gloo, on the CPU) has none of that: the gradient is the mean of the
processes' own. One GPU makes a group of one process, which uses NCCL like several.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from lib.model import Objective
from lib.training import optim
from lib.training.steps import total_loss, train_steps
from tests.dist import gradients

NAME = "lavt_one"


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy without class weights: the mean over parts is that over the whole."""
    return F.cross_entropy(logits, target)


def backward(
    batch: dict[str, Tensor], device: torch.device, info: utils.DistInfo | None
) -> nn.Module:
    """A model after a backward pass; under DDP where ``info`` is given."""
    model = gradients.model(NAME).to(device)
    objective: nn.Module = Objective(model, loss)
    if info is not None:
        objective = utils.wrap_ddp(objective, info)
        assert isinstance(objective, nn.parallel.DistributedDataParallel)
    total_loss(objective({k: v.to(device) for k, v in batch.items()})).backward()
    return objective.module.model if info is not None else model


def state(model: nn.Module) -> dict[str, Tensor]:
    """Gradients, and statistics of batch norms."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b for n, b in model.named_buffers() if "running" in n}


def main() -> None:
    info = utils.init_distributed(sys.argv[1])
    device, world = info.device, info.world
    if world == 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        info = replace(info, world=2)  # for wrap_ddp, which leaves a single process as it is
    shards = [gradients.shard(rank) for rank in range(world)]
    wrapped = backward(shards[info.rank], device, info)
    norms = [m for m in wrapped.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert bool(norms) is (device.type == "cuda"), "batch norms are not synchronised"
    if norms:
        whole = {k: torch.cat([s[k] for s in shards]) for k in shards[0]}
        expected = state(backward(whole, device, None))
    else:
        alone = [state(backward(shard, device, None)) for shard in shards]
        expected = {k: torch.stack([a[k] for a in alone]).mean(0) for k in alone[0]}
        expected |= {k: v for k, v in alone[info.rank].items() if "running" in k}
    found = state(wrapped)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-11, msg=name)
    make_step(info)
    print(f"ok {info.rank} {dist.get_backend()} {len(norms)}")
    dist.destroy_process_group()


def make_step(info: utils.DistInfo) -> None:
    """Two steps of the trainer's own loop in float32: every process ends with the same weights."""
    torch.manual_seed(0)
    model = gradients.model(NAME).float().to(info.device)
    groups = optim.parameter_groups(model, 1e-2, lang_layers=2)
    optimizer = optim.build_optimizer(groups, 1e-3)
    batch = gradients.shard(info.rank) | {"index": torch.arange(2)}
    batch["image"] = (batch["image"].clamp(-2, 2) * 50 + 100).byte()
    schedule = optim.poly_schedule(optimizer, 10)
    objective = utils.wrap_ddp(Objective(model, loss), info)
    for step in train_steps(objective, [batch] * 2, optimizer, schedule, info.device):
        assert step.finite
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = weights.clone()
    dist.broadcast(others, src=0)
    assert torch.equal(weights, others)


if __name__ == "__main__":
    main()
