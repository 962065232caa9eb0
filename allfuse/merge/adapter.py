"""LoRA adapters as peft writes them, on the model that they were trained on. Loads no torch.

W + s B A for each adapted W, with B (out, r), A (r, in) and s = alpha / r, or alpha / sqrt(r) with
use_rslora (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1; Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732). Of embeddings, and of layers whose weight is (in, out)
(fan_in_fan_out), it is the transposed of that; of convolutions A and B are seen as matrices.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allfuse.base.errors import MergeError
from allfuse.merge.entries import Adapted, transposed
from allfuse.merge.header import Entry, read_header
from allfuse.merge.source import Source
from allfuse.store.durable import parse_json
from allfuse.store.model_files import INDEX, SINGLE

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.\w+)*(?<!\.bias)"
)
PREFIX = "base_model.model."
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the model's own weights as they are; of init_lora_weights."""
OTHERWISE = {
    "use_dora": "DoRA changes the length of each row, too",
    "lora_bias": "its B has a bias",
    "use_qalora": "QALoRA pools its inputs",
    "layer_replication": "it copies layers",
    "target_parameters": "it changes parameters that are no layer's weight",
    "trainable_token_indices": "it changes some rows of an embedding",
    "alora_invocation_tokens": "it is at work after certain words only",
    "use_bdlora": "its matrices are in blocks",
    "arrow_config": "it chooses among several adapters for each word",
    "megatron_config": "its layers are cut over processes",
}
"""Settings with which an adapter is more, or other, than W + s B A."""


@dataclass(frozen=True)
class Factors:
    """A and B of one module."""

    module: str
    a: Entry
    b: Entry
    is_embedding: bool


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model that it was added to."""
    whole = any((folder / name).is_file() for name in (SINGLE, INDEX))
    return (folder / CONFIG).is_file() and not whole


def find_base(folder: Path) -> Path:
    """The model that an adapter says it was trained on, seen from here or from its own folder.

    Raises:
        MergeError: it says none, or one that is not on this machine.
    """
    said = _read_config(folder).get("base_model_name_or_path")
    if isinstance(said, str) and said:
        for place in (Path(said), folder / said):
            with contextlib.suppress(OSError):  # a name that no file can have
                if place.exists() and not is_adapter(place):
                    return place
    raise MergeError(
        f"{folder} is an adapter on {said!r}, which is no file or folder here; next: say where the "
        f"model is: BASE+{folder}"
    )


def adapt(base: Source, folder: Path) -> Source:
    """A model with an adapter added to it.

    Raises:
        MergeError: the adapter cannot be read, is of another kind than LoRA, or does not fit.
    """
    config = _read_config(folder)
    _refuse_other_kinds(folder, config)
    entries = _read_weights(folder)
    path = Path(f"{base.path}+{folder}")
    changed: dict[str, Entry] = {}
    used: set[str] = set()
    for factors in _pairs(folder, entries, used):
        name = _own_name(base, f"{factors.module}.weight", folder)
        if name in changed:
            raise MergeError(
                f"{folder} changes {name} twice, once under the name of {factors.module} (tied "
                "weights); next: merge it where it was trained, with peft"
            )
        changed[name] = _adapted(folder, base.entries[name], factors, config)
    whole = {
        name: replace(entry, name=name)
        for key, entry in entries.items()
        if key not in used
        for name in [_own_name(base, key, folder, may_be_new=True)]
    }
    _refuse_misfits(folder, base, whole)
    return _changed(base, path, folder, changed | whole)


def _changed(base: Source, path: Path, folder: Path, changed: Mapping[str, Entry]) -> Source:
    new = [name for name in changed if name not in base.entries]
    entries = {n: changed.get(base.tied.get(n, n), entry) for n, entry in base.entries.items()}
    entries |= {name: changed[name] for name in new}
    files = {file: list(names) for file, names in base.files.items()}
    next(reversed(files.values())).extend(new)
    return Source(path, entries, base.tied, files, base.texts, roots=(*base.places, folder))


def _adapted(folder: Path, base: Entry, factors: Factors, config: Mapping[str, Any]) -> Adapted:
    """Raises MergeError: shapes do not fit."""
    a, b = factors.a, factors.b
    rank = a.shape[0] if a.shape else 0
    flip = factors.is_embedding or bool(config.get("fan_in_fan_out"))
    fits = (
        rank
        and min(len(a.shape), len(b.shape), len(base.shape)) >= 2
        and b.count == b.shape[0] * rank
        and base.is_float
        and a.is_float
        and b.is_float
    )
    left, right = (_matrix(b, b.shape[0]), _matrix(a, rank)) if fits else (b, a)
    if fits and flip:
        left, right = transposed(right), transposed(left)
    if not fits or left.shape[0] != base.shape[0] or left.shape[0] * right.shape[1] != base.count:
        raise MergeError(
            f"{folder}: A {list(a.shape)} and B {list(b.shape)} of {factors.module} do not fit "
            f"{base.name} {list(base.shape)} of the base; next: the base that the adapter was "
            f"trained on, and fan_in_fan_out in {CONFIG} as it was then"
        )
    scale = _scale(folder, factors.module, rank, config)
    return Adapted(base.name, base.dtype, base.shape, a.file, 0, base, left, right, scale)


def _matrix(entry: Entry, rows: int) -> Entry:
    """A tensor as a matrix with these rows."""
    shape = (rows, entry.count // rows)
    if type(entry) is not Entry and entry.shape != shape:
        raise MergeError(f"{entry.file}: {entry.name} does not lie end to end; next: save it so")
    return entry if entry.shape == shape else replace(entry, shape=shape)


def _scale(folder: Path, module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if _is_meant(folder, pattern, module):
            alpha = own
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise MergeError(f"{folder / CONFIG}: lora_alpha {alpha!r}; allowed: a number")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _is_meant(folder: Path, pattern: Any, module: str) -> bool:
    """Whether a name in alpha_pattern is that of a module: all of it, or its end.

    Raises:
        MergeError: it is a regular expression, of which strangers' ones are not tried.
    """
    if not isinstance(pattern, str) or not re.fullmatch(r"\^?[\w.-]+", pattern):
        raise MergeError(
            f"{folder / CONFIG}: alpha_pattern {pattern!r}; allowed: names of modules, no regular "
            "expressions; next: merge it with peft"
        )
    if pattern.startswith("^"):
        return module == pattern[1:]
    return module == pattern or module.endswith(f".{pattern}")


def _pairs(folder: Path, entries: Mapping[str, Entry], used: set[str]) -> Iterator[Factors]:
    """Which A and B belong to each other; their names go into `used`."""
    found: dict[tuple[str, bool], dict[str, Entry]] = {}
    for key, entry in entries.items():
        match = FACTOR.fullmatch(key)
        if match:
            used.add(key)
            place = match["module"].removeprefix(PREFIX), bool(match["embedding"])
            if match["side"] in found.setdefault(place, {}):
                raise MergeError(f"{folder} has two {match['side']} for {place[0]}; allowed: one")
            found[place][match["side"]] = entry
        elif "lora_" in key:
            raise MergeError(
                f"{folder} holds {key}, which is neither A nor B of LoRA; allowed: W + s B A; "
                "next: merge it with peft"
            )
    for (module, is_embedding), sides in found.items():
        if len(sides) != 2:
            (side,) = sides
            raise MergeError(f"{folder} has {side} of {module} and not the other of A and B")
        yield Factors(module, sides["A"], sides["B"], is_embedding)


def _own_name(base: Source, key: str, folder: Path, may_be_new: bool = False) -> str:
    """Under which name the base keeps what an adapter has under another one: without the prefix of
    peft, and where needed without the first part, as the base of a transformers model is named.

    Raises:
        MergeError: under none.
    """
    name = key.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
    for own in (name, name.partition(".")[2]):
        if own in base.entries:
            return base.tied.get(own, own)
    if may_be_new:
        return name
    raise MergeError(
        f"{folder} changes {name}, and {base.path} has no such tensor; next: the base that the "
        "adapter was trained on"
    )


def _refuse_misfits(folder: Path, base: Source, whole: Mapping[str, Entry]) -> None:
    """Refuse whole tensors of other shapes, or in the place of tied ones."""
    for name, entry in whole.items():
        if name in base.entries and base.entries[name].shape != entry.shape:
            raise MergeError(
                f"{folder}: {name} is {list(entry.shape)}, and {list(base.entries[name].shape)} in "
                f"{base.path}; next: the base that the adapter was trained on"
            )
        if name in base.tied.values():
            other = next(tied for tied, kept in base.tied.items() if kept == name)
            raise MergeError(
                f"{folder} has a {name} of its own, which is tied to {other} in {base.path}; next: "
                "save the base with both"
            )


def _refuse_other_kinds(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise MergeError(
            f"{folder} is an adapter of the kind {kind}; allowed: LORA; next: merge it with peft, "
            "and fuse the result"
        )
    begun = config.get("init_lora_weights")
    reasons = [why for key, why in OTHERWISE.items() if config.get(key)]
    if begun not in STARTS:
        reasons.append(f"init_lora_weights={begun!r} changed the model that it was trained on")
    if reasons:
        raise MergeError(
            f"{folder} is no plain LoRA adapter: {'; '.join(reasons)}; next: merge it with peft, "
            "and fuse the result"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MergeError(f"{path} cannot be read: {error}; next: copy the adapter again") from error
    if not isinstance(config, dict):
        raise MergeError(f"{path} is no JSON object; next: copy the adapter again")
    return config


def _read_weights(folder: Path) -> dict[str, Entry]:
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS).entries
    if (folder / OLD_WEIGHTS).is_file():
        from allfuse.merge.torch_file import open_torch

        return open_torch(folder, [folder / OLD_WEIGHTS]).entries
    raise MergeError(f"{folder} has {CONFIG} and no weights; allowed: {WEIGHTS} or {OLD_WEIGHTS}")
