"""A Hugging Face Trainer whose gradients are fused by a plan of allfuse: in 8 bits.

The Trainer makes the DistributedDataParallel model; a callback registers the hook on it. The model
is a tiny BERT with random weights that learns whether a row of words holds more high than low ones.

torchrun --nproc-per-node 2 examples/trainer_hook.py
torchrun --nproc-per-node 2 examples/trainer_hook.py --plan "data(2, topology=central)"
"""

import argparse
import sys
import tempfile

import torch

import allfuse as af

try:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
except ImportError:
    sys.exit("this example needs two packages; next: pip install transformers accelerate")


class Fuse(TrainerCallback):
    def __init__(self, plan):
        self.plan = plan

    def on_train_begin(self, arguments, state, control, **others):
        self.trainer.model_wrapped.register_comm_hook(None, af.comm_hook(self.plan))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plan", default="data(2, codec=int8)")
    arguments = parser.parse_args()

    words = torch.randint(0, 32, (2000, 12), generator=torch.Generator().manual_seed(0))
    labels = ((words >= 16).sum(1) > 6).long()
    rows = [{"input_ids": row, "labels": label} for row, label in zip(words, labels, strict=True)]
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    fuse = Fuse(arguments.plan)
    fuse.trainer = Trainer(
        BertForSequenceClassification(config),
        TrainingArguments(
            tempfile.mkdtemp(),
            use_cpu=True,
            max_steps=arguments.steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            logging_steps=10,
            average_tokens_across_devices=False,  # each row has one label
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=rows,
        callbacks=[fuse],
    )
    fuse.trainer.train()
    if fuse.trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in fuse.trainer.state.log_history if "loss" in entry]
        print(f"loss of rank 0 {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
