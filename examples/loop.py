"""A script with a loop of its own: an ordinary DataLoader, backward and optimizer, in a session.

The same script runs alone, on several workers of this machine, and under torchrun:

python examples/loop.py
allfuse run examples/loop.py --plan "data(2)" -- --epochs 3
torchrun --nproc-per-node 2 examples/loop.py
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import allfuse as af


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=3e-3)
    arguments = parser.parse_args()

    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    samples = TensorDataset(pixels, torch.tensor(digits.target))
    parts = random_split(samples, [1500, 297], torch.Generator().manual_seed(0))
    train = DataLoader(parts[0], batch_size=60, shuffle=True)
    test = DataLoader(parts[1], batch_size=60)

    with af.session() as s:
        model = s.model(lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
        optimizer = s.optimizer(torch.optim.AdamW(model.parameters(), lr=arguments.lr))
        for x, y in s.batches(train, epochs=arguments.epochs):
            loss = F.cross_entropy(model(x), y)
            s.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        figures = s.evaluate({"accuracy": af.accuracy}, test, name="test")
        s.print(f"test accuracy {figures['accuracy']:.4f} with plan {s.plan}")


if __name__ == "__main__":
    main()
