"""What somebody would write without the service: the same network, data and batches, for `torchrun`.

    torchrun --nproc-per-node 2 benchmarks/plain_ddp.py JOB_FOLDER

JOB_FOLDER holds a task.json. Rank 0 writes a checkpoint after each epoch, and a line of JSON: epoch and time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlmesh_training.trainer.fitting.batches import Plan
from mlmesh_training.trainer.run import load, read_task


def main(folder: Path) -> None:
    """Fit, from the last checkpoint where there is one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    task = read_task(folder)
    settings = task.hyperparameters
    definition, loaded = load(folder, task)
    torch.manual_seed(task.seed)
    model = DistributedDataParallel(definition.build(settings, loaded))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
    )
    plan = Plan(examples=len(loaded.train), batch=int(settings["batch_size"]))
    epochs = int(settings["epochs"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings["learning_rate"], total_steps=epochs * plan.steps + 1
    )
    path, start = folder / "plain.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["epoch"]
    for epoch in range(start, epochs):
        model.train()  # type: ignore[no-untyped-call]
        for (rows,) in plan.order(seed=task.seed, epoch=epoch):
            part = loaded.train.rows(torch.tensor_split(rows, world)[rank])
            loss = nn.functional.cross_entropy(model(*part.inputs), part.targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if rank == 0:
            model.eval()
            with torch.no_grad():
                nn.functional.cross_entropy(model.module(*loaded.validation.inputs), loaded.validation.targets)
            state = {
                "model": model.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "epoch": epoch + 1,
            }
            torch.save(state, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
            print(json.dumps({"epoch": epoch + 1, "time": time.monotonic()}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
