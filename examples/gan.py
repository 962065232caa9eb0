"""Two models, two optimizers: a GAN learns eight clusters on a circle.

Each of the two steps names the model and the optimizer that it is about; only that optimizer's
parameters get gradients, so nothing has to be detached.

python examples/gan.py
allfuse run examples/gan.py --plan "data(2)" -- --epochs 30
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

import allfuse as af

NOISE = 2


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()

    with af.session(seed=1) as s:
        generator = s.model(lambda: network(NOISE, 2), "generator")
        discriminator = s.model(lambda: network(2, 1), "discriminator")
        make = s.optimizer(torch.optim.Adam(generator.parameters(), 5e-4, betas=(0.5, 0.999)))
        judge = s.optimizer(torch.optim.Adam(discriminator.parameters(), 2e-3, betas=(0.5, 0.999)))

        def tell_apart(model, real):
            fake = generator(torch.randn(len(real), NOISE, device=s.device))
            return model(real), model(fake)

        def fool(model, real):
            return discriminator(model(torch.randn(len(real), NOISE, device=s.device)))

        for real in s.batches(clusters(20_000), batch_size=200, epochs=arguments.epochs):
            s.step(real, apart_loss, forward=tell_apart, model=discriminator, optimizer=judge)
            s.step(real, fooled_loss, forward=fool, model=generator, optimizer=make)

        if s.is_main:
            with torch.no_grad():
                points = generator(torch.randn(2000, NOISE, device=s.device)).cpu()
            near, found = quality(points)
            s.print(f"{near:.0%} of the points lie in a cluster, {found} of 8 clusters are found")


def network(inputs, outputs, width=128):
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, outputs),
    )


def apart_loss(outputs, batch):
    real, fake = outputs
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def fooled_loss(outputs, batch):
    return F.softplus(-outputs).mean()


def centers():
    angles = torch.arange(8) * math.pi / 4
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def clusters(count):
    """Points around eight centers on the unit circle."""
    random = torch.Generator().manual_seed(0)
    which = torch.randint(8, (count,), generator=random)
    return centers()[which] + 0.05 * torch.randn(count, 2, generator=random)


def quality(points):
    """The part of the points that lie within 0.2 of a center; how many centers have their share."""
    distance, which = torch.cdist(points, centers()).min(dim=1)
    good = distance < 0.2
    counts = torch.bincount(which[good], minlength=8)
    return good.float().mean().item(), int((counts > len(points) / 32).sum())


if __name__ == "__main__":
    main()
