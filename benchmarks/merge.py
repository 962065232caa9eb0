"""Fuses four fine-tunes of a base, 664 M parameters in bf16, and compares with mergekit.

Whole commands, from start to end, on models that were just written, so that their files are in the
page cache; the sides take turns. The floor reads the same bytes and writes as many, block by block
as a merge does, without arithmetic and without torch. Peak memory is the largest resident set of
the process.

    python benchmarks/merge.py --mergekit /path/to/python     # one that has mergekit 0.1.5

Without the option mergekit takes part where this Python has it. Models and results lie in the
folder for temporary files (TMPDIR): 8 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import torch
import yaml
from merge_floor import FLOOR, WATCH
from safetensors.torch import save_file

TUNES, SHARDS, MANY_SHARDS = 4, 4, 200
DRY_RUN_S, MEMORY, OVER_FLOOR = 1.0, 0.15, 1.6


@dataclass(frozen=True, kw_only=True)
class Method:
    """rule: as allfuse says it. target: over mergekit's seconds. rounds: how often both run."""

    rule: str
    target: float
    rounds: int
    takes: int = TUNES
    has_base: bool = False


METHODS = {
    "linear": Method(rule="linear", target=0.22, rounds=3),
    "slerp": Method(rule="slerp(t=0.3)", target=0.2, rounds=2, takes=2),
    "dare_ties": Method(rule="dare_ties(density=0.2)", target=0.2, rounds=2, has_base=True),
    "ties": Method(rule="ties(density=0.2)", target=0.12, rounds=1, has_base=True),
}


@dataclass
class Side:
    """What whole commands took: seconds, and the most memory in bytes."""

    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def run(self, command: list[str], log: Path) -> str:
        """What the command printed."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with open(log, "wb") as said:
            done = subprocess.run(
                [sys.executable, "-c", WATCH, *command],
                stdout=subprocess.PIPE, stderr=said, env=environment, text=True,
            )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed\n{log.read_text()[-2000:]}")
        found = json.loads(done.stdout)
        self.seconds.append(found["seconds"])
        self.memory.append(found["memory"])
        return log.read_text()


def config(quick: bool) -> dict[str, Any]:
    """A Llama's: mergekit needs to know what it reads."""
    hidden, inner, layers, words = (64, 128, 2, 1000) if quick else (1536, 4096, 20, 32000)
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": words, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    }  # fmt: skip


def shapes(about: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = about["hidden_size"], about["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (about["vocab_size"], hidden)}
    for number in range(about["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for name in "qkvo":
            found[f"{layer}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        found[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        found[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        found[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        found[f"{layer}.input_layernorm.weight"] = (hidden,)
        found[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    found["lm_head.weight"] = (about["vocab_size"], hidden)
    return found


def make(folder: Path, about: dict[str, Any], seed: int) -> int:
    """A base (seed 0) or a fine-tune of it, in shards with an index; how many parameters."""
    names = shapes(about)
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    for at, (name, shape) in enumerate(names.items()):
        value = torch.empty(shape).normal_(0, 0.02, generator=base)
        if seed:
            value += torch.empty(shape).normal_(0, 0.002, generator=own)
        parts[at * SHARDS // len(names)][name] = value.bfloat16()
    save_parts(folder, parts)
    (folder / "config.json").write_text(json.dumps(about))
    return sum(value.numel() for part in parts for value in part.values())


def save_parts(folder: Path, parts: list[dict[str, torch.Tensor]]) -> None:
    """A model of so many files and their index."""
    folder.mkdir()
    places = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    total = sum(value.nbytes for part in parts for value in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def recipe(name: str, models: list[Path], base: Path) -> dict[str, Any]:
    """The same for mergekit."""
    method = METHODS[name]
    if name == "slerp":
        sources = [{"model": str(model)} for model in models[: method.takes]]
        return {"merge_method": "slerp", "base_model": str(models[0]), "models": sources,
                "parameters": {"t": 0.3}, "dtype": "bfloat16"}  # fmt: skip
    options = {"weight": 0.25} | ({"density": 0.2} if method.has_base else {})
    own = [{"model": str(model), "parameters": options} for model in models]
    made: dict[str, Any] = {"merge_method": name, "models": own, "dtype": "bfloat16"}
    return made | ({"base_model": str(base)} if method.has_base else {})


def command(name: str, models: list[Path], base: Path, out: Path) -> list[str]:
    method = METHODS[name]
    chosen = models[: method.takes]
    start = ["--base", str(base)] if method.has_base else []
    weights = [] if name == "slerp" else ["--weights", ",".join(["0.25"] * len(chosen))]
    tool = [sys.executable, "-m", "allfuse", "merge", *map(str, chosen), "--quiet"]
    return [*tool, "--rule", method.rule, *start, *weights, "--out", str(out)]


class Bench:
    """The folder of models, and what is measured on them."""

    def __init__(self, root: Path, quick: bool, mergekit: str | None) -> None:
        self.root, self.quick, self.mergekit = root, quick, mergekit
        self.base, self.out, self.log = root / "base", root / "out", root / "log"
        self.models = [root / f"tune{number}" for number in range(1, TUNES + 1)]
        about = config(quick)
        for seed, folder in enumerate([self.base, *self.models]):
            self.parameters = make(folder, about, seed)

    def turns(self, name: str) -> tuple[Side, Side, list[dict[str, float]]]:
        """Ours, mergekit's, and for linear the floor's, in turns."""
        ours, theirs, floors = Side(), Side(), []
        file = self.root / "recipe.yml"
        file.write_text(yaml.safe_dump(recipe(name, self.models, self.base)))
        for _ in range(1 if self.quick else METHODS[name].rounds):
            if self.mergekit is not None:
                tool = [self.mergekit, "-m", "mergekit.scripts.run_yaml", str(file), str(self.out)]
                self._clear()
                theirs.run([*tool, "--allow-crimes", "--no-copy-tokenizer"], self.log)
            self._clear()
            ours.run(command(name, self.models, self.base, self.out), self.log)
            if name == "linear":
                self._clear()
                floors.append(self._floor())
        return ours, theirs, floors

    def _clear(self) -> None:
        """What was written before is gone, and does not keep the disk busy."""
        shutil.rmtree(self.out, ignore_errors=True)
        os.sync()

    def _floor(self) -> dict[str, float]:
        """Seconds to read and write, and to bring it to the disk then."""
        self.out.mkdir()
        script = [sys.executable, "-c", FLOOR, str(self.out), *map(str, self.models)]
        found: dict[str, float] = json.loads(Side().run(script, self.log))
        return found

    def dry_run(self) -> list[float]:
        """Seconds of --dry-run on models of many files."""
        side, models = Side(), [self.root / f"many{number}" for number in (0, 1)]
        parts = [{f"w{n}.{m}": torch.zeros(8) for m in range(4)} for n in range(MANY_SHARDS)]
        for model in models:
            save_parts(model, parts)
        tool = [sys.executable, "-m", "allfuse", "merge", *map(str, models), "--dry-run"]
        for _ in range(1 if self.quick else 5):
            side.run([*tool, "--out", str(self.out / "dry")], self.log)
        return side.seconds


def tell(name: str, ours: Side, theirs: Side) -> list[harness.Figure]:
    seconds, memory = harness.quartiles(ours.seconds)[1], harness.quartiles(ours.memory)[1]
    told = f"{seconds:.1f} s, {memory / 1e6:.0f} MB"
    if not theirs.seconds:
        return [harness.figure(f"{name}, whole command", ours.seconds, unit="s", floor=told)]
    peer = harness.quartiles(theirs.seconds)[1], harness.quartiles(theirs.memory)[1]
    told += f" against {peer[0]:.1f} s, {peer[1] / 1e6:.0f} MB"
    over = f"{name} over mergekit"
    times = harness.ratios(ours.seconds, theirs.seconds)
    sizes = harness.ratios(ours.memory, theirs.memory)
    target = METHODS[name].target
    return [
        harness.figure(f"{over}, whole command", times, target=target, floor=told),
        harness.figure(f"{over}, peak memory", sizes, target=MEMORY, floor=told),
    ]


def tell_floor(ours: Side, floors: list[dict[str, float]]) -> list[harness.Figure]:
    bare, synced = [f["seconds"] for f in floors], [f["sync_seconds"] for f in floors]
    told = (
        f"{harness.quartiles(ours.seconds)[1]:.1f} s, synced, against "
        f"{harness.quartiles(bare)[1]:.1f} s, and {harness.quartiles(synced)[1]:.1f} s to sync then"
    )
    name = "linear, whole command, over reading and writing alone"
    whole = [a + b for a, b in zip(bare, synced, strict=True)]
    return [
        harness.figure(name, harness.ratios(ours.seconds, bare), target=OVER_FLOOR, floor=told),
        harness.figure(f"{name} and syncing", harness.ratios(ours.seconds, whole), floor=told),
    ]


def find_mergekit(said: str | None) -> str | None:
    """The Python that has mergekit; None: none has."""
    if said is not None:
        return said
    return sys.executable if find_spec("mergekit") is not None else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help=harness.QUICK)
    parser.add_argument("--mergekit", metavar="PYTHON", help="the Python that has mergekit")
    asked = parser.parse_args()
    options, mergekit = harness.Options(quick=asked.quick), find_mergekit(asked.mergekit)
    figures: list[harness.Figure] = []
    with tempfile.TemporaryDirectory(prefix="allfuse-merge-") as held:
        bench = Bench(Path(held), options.quick, mergekit)
        print(f"{TUNES} fine-tunes and a base of {bench.parameters / 1e6:.0f} M in {held}")
        for name in METHODS:
            ours, theirs, floors = bench.turns(name)
            figures += tell(name, ours, theirs)
            figures += tell_floor(ours, floors) if floors else []
        name = f"--dry-run, two models of {MANY_SHARDS} files"
        figures.append(harness.figure(name, bench.dry_run(), unit="s", target=DRY_RUN_S))
    harness.report("merge", figures, options, [] if mergekit else ["mergekit"])


if __name__ == "__main__":
    main()
