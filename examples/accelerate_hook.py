"""A loop for Accelerate whose gradients are fused by a plan of allfuse: 1 % of them each step.

Two lines differ from a script without allfuse: the import and `register_comm_hook`.

torchrun --nproc-per-node 2 examples/accelerate_hook.py
torchrun --nproc-per-node 2 examples/accelerate_hook.py --plan "data(2, topology=ring)"
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import allfuse as af

try:
    from accelerate import Accelerator
except ImportError:
    sys.exit("this example needs the package accelerate; next: pip install accelerate")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--plan", default="data(2, codec=topk(0.01))")
    arguments = parser.parse_args()

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    digits = load_digits()
    samples = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
    loader = DataLoader(samples, batch_size=30, shuffle=True)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    model.register_comm_hook(None, af.comm_hook(arguments.plan))
    for epoch in range(arguments.epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch + 1}  loss of rank 0 {loss.item():.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
