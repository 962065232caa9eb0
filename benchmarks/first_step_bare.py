"""The same first step by hand: torch.multiprocessing, init_process_group, DDP. For `startup.py`.

python benchmarks/first_step_bare.py STAMP PORT
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import models
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

WORKERS = 2


def work(rank: int, stamp: str, port: str) -> None:
    """One worker: join, build, one step."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", port
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    torch.set_num_threads(1)
    case = models.CASES["mlp"]
    model = DistributedDataParallel(models.build(case))
    loop = models.PlainLoop(model, case, case.data(), case.share * WORKERS, WORKERS, rank)
    loop.run(1)
    if rank == 0:
        Path(stamp).write_text(repr(time.time()), encoding="utf-8")
    del model, loop  # torch 2.13 may abort when a group ends before its model
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1], sys.argv[2]), nprocs=WORKERS)
