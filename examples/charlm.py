"""A job file: a small GPT learns to write Python, character by character, in a minute or two.

Its text is on every machine: the source of Python's own standard library. Shows a loss that is a
(sum, count) over tokens, a learning-rate schedule, clipping, and a hook that writes a sample.

allfuse train examples/charlm.py --workers 2 --out runs/charlm
allfuse train examples/charlm.py --workers 2 --set layers=4 --set width=192 --set lr=3e-3
allfuse verify examples/charlm.py --plan "data(2)" --steps 3
"""

import math
import os
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import allfuse as af

CHARACTERS = 256  # a character is a byte: the standard library is ASCII but for a few comments


def job(
    layers=2, width=96, context=64, batch_size=16, steps=2000, lr=1e-2, megabytes=4.0
) -> af.Job:
    text, held_out = read_standard_library(int(megabytes * 1e6))
    warmup = min(100, max(1, steps // 10))
    return af.Job(
        model=lambda: GPT(layers, width, context),
        train=windows(text, context),
        validation=windows(held_out[: 1024 * context + 1], context),
        forward=lambda model, batch: model(batch[:, :-1].long()),
        loss=loss,
        metrics={"bits_per_character": bits_per_character},
        monitor="-bits_per_character",
        optimizer=lambda parameters: torch.optim.AdamW(
            parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1
        ),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, cosine(step / steps))
        ),
        batch_size=batch_size,
        clip=1.0,
        stop=af.Stop(steps=steps),
        evaluate_every=max(1, steps // 4),
        save_every=max(1, steps // 4),
        hooks=[af.on("evaluated", show_sample)],
    )


def loss(logits, batch):
    """Summed over all tokens of the batch, and how many they are."""
    target = batch[:, 1:].long()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"), target.numel()


def bits_per_character(logits, batch):
    total, count = loss(logits, batch)
    return total / math.log(2), count


def cosine(done):
    """1 at the start, 0.1 at the end."""
    return 0.55 + 0.45 * math.cos(math.pi * min(done, 1.0))


# The text.


def read_standard_library(size):
    """Source text of about `size` bytes for training, and that of every tenth file, held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"}
    parts = [bytearray(), bytearray()]
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - skipped)
        for number, name in enumerate(sorted(f for f in files if f.endswith(".py"))):
            part = parts[number % 10 == 9]
            if len(part) < size:
                part += (Path(folder) / name).read_bytes().replace(b"\r\n", b"\n")
    return [torch.frombuffer(part[:size], dtype=torch.uint8) for part in parts]


def windows(text, context):
    """Row i is characters i * context to (i + 1) * context, the last of them only to be guessed."""
    return text.unfold(0, context + 1, context)


# The model. B: batch, T: context, W: width, H: heads, C: characters.


class GPT(nn.Module):
    def __init__(self, layers, width, context):
        super().__init__()
        self.context = context
        self.token = nn.Embedding(CHARACTERS, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, layers) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS, bias=False)
        nn.init.normal_(self.position.weight, std=0.1)
        nn.init.zeros_(self.head.weight)  # the first guess is that all characters are alike: 8 bits

    def forward(self, tokens):  # (B, T) -> (B, T, C)
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Block(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.heads = max(1, width // 32)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for last in (self.out, self.down):  # so that the depth does not change the sum's scale
            nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, x):  # (B, T, W)
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T,)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


@torch.no_grad()
def write(model, start, length):
    """The start, continued by `length` characters drawn from the model."""
    tokens = torch.tensor([list(start.encode())], device=model.head.weight.device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(length):
        logits = model(tokens[:, -model.context :])[0, -1].cpu()
        drawn = torch.multinomial((logits / 0.7).softmax(0), 1, generator=generator)
        tokens = torch.cat([tokens, drawn.to(tokens.device)[None]], dim=1)
    text = bytes(tokens[0].tolist()).decode("latin-1")
    return "".join(c if c == "\n" or " " <= c <= "~" else "." for c in text)


def show_sample(session, event):
    """Called on every rank after each evaluation; one of them writes."""
    if session.is_main:
        session.print(write(session.models["model"], "def ", 120) + "\n")
