"""A Lightning Trainer whose gradients are fused by a plan of allfuse: matrices of rank 4.

Lightning makes the DistributedDataParallel model; a callback registers the hook on it.

torchrun --nproc-per-node 2 examples/lightning_hook.py
torchrun --nproc-per-node 2 examples/lightning_hook.py --plan "data(2, topology=tree)"
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
    import lightning as L
except ImportError:
    sys.exit("this example needs the package lightning; next: pip install lightning")


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, index):
        x, y = batch
        self.loss = F.cross_entropy(self.net(x), y)
        return self.loss

    def on_train_epoch_end(self):
        self.print(f"epoch {self.current_epoch + 1}  loss of rank 0 {self.loss.item():.4f}")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Fuse(L.Callback):
    def __init__(self, plan):
        self.plan = plan

    def on_train_start(self, trainer, module):
        trainer.strategy.model.register_comm_hook(None, af.comm_hook(self.plan))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--plan", default="data(2, codec=lowrank(4))")
    arguments = parser.parse_args()

    L.seed_everything(0)
    digits = load_digits()
    samples = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=arguments.epochs,
        callbacks=[Fuse(arguments.plan)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Digits(), DataLoader(samples, batch_size=30, shuffle=True))


if __name__ == "__main__":
    main()
