"""Trains a Hugging Face model: a tiny BERT judges short reviews, in which "not" turns a word.

The model class comes from transformers, built from a config with random weights, so nothing is
downloaded; with `from_pretrained` in its place the rest stays as it is. Batches are dicts, padded
by a collate function, and the loss is the one that the model computes itself.

python examples/finetune.py
allfuse run examples/finetune.py --plan "data(2)" -- --epochs 5 --out runs/finetune
"""

import argparse
import math
import random
import sys

import torch

import allfuse as af

try:
    from transformers import BertConfig, BertForSequenceClassification
except ImportError:
    sys.exit("this example needs the package transformers; next: pip install transformers")

GOOD = "good great funny warm clever bright honest moving"
BAD = "bad dull slow cold silly bleak false boring"
THINGS = "film plot cast music ending dialogue camera story"
WORDS = ["[pad]", *f"the was not and but {THINGS} {GOOD} {BAD}".split()]
NUMBER = {word: number for number, word in enumerate(WORDS)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--out", help="the run folder to make")
    arguments = parser.parse_args()

    reviews = write_reviews(arguments.samples + 500)
    train, held_out = reviews[:-500], reviews[-500:]

    with af.session(out=arguments.out, clip=1.0) as s:
        model = s.model(build)
        optimizer = s.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
        steps = arguments.epochs * math.ceil(len(train) / 50)
        s.scheduler(torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps))
        for batch in s.batches(train, 50, arguments.epochs, collate=collate):
            s.step(batch, loss)
            if s.due("epoch"):
                s.evaluate({"accuracy": af.accuracy}, held_out, collate=collate)


def build():
    """A tiny BERT with random weights. The input's mask and labels are arguments of its forward."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def loss(outputs, batch):
    """The mean over the samples, as the model computed it from batch["labels"]."""
    return outputs.loss


def collate(samples):
    """Reviews of unequal length as one dict of tensors."""
    longest = max(len(numbers) for numbers, _ in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    for row, (numbers, _) in enumerate(samples):
        ids[row, : len(numbers)] = torch.tensor(numbers)
    labels = torch.tensor([label for _, label in samples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def write_reviews(count):
    """Reviews of 3 to 5 judgements; the label is 1 when most of them praise."""
    draw = random.Random(0)
    reviews = []
    while len(reviews) < count:
        words, balance = [], 0
        for number in range(draw.choice((3, 5))):
            good, turned = draw.random() < 0.5, draw.random() < 0.4
            words += [draw.choice(("and", "but"))] if number else []
            words += ["the", draw.choice(THINGS.split()), "was", *(["not"] if turned else [])]
            words.append(draw.choice((GOOD if good else BAD).split()))
            balance += 1 if good != turned else -1
        reviews.append(([NUMBER[word] for word in words], int(balance > 0)))
    return reviews


if __name__ == "__main__":
    main()
