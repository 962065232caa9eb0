"""An ordinary DistributedDataParallel script whose gradients are fused by a plan of allfuse.

They go round a ring, in 8 bits. Two lines differ from a script without allfuse: the import and
`register_comm_hook`.

torchrun --nproc-per-node 2 examples/ddp_hook.py
allfuse run examples/ddp_hook.py --plan "data(2)"
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import allfuse as af


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    samples = TensorDataset(pixels, torch.tensor(digits.target))
    sampler = DistributedSampler(samples, seed=0)
    loader = DataLoader(samples, batch_size=30, sampler=sampler)

    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model = DistributedDataParallel(net)
    plan = af.data(dist.get_world_size(), topology="ring", codec="int8")
    model.register_comm_hook(None, af.comm_hook(plan))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}  loss of rank 0 {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # after the model is gone: torch 2.13 may hang the other way round
