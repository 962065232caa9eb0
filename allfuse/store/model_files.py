"""In which safetensors files a model's weights are, and which models are in a folder. Loads no
torch."""

from __future__ import annotations

import re
from pathlib import Path

from allfuse.base.errors import CheckpointError, UserError
from allfuse.base.order import natural
from allfuse.store.durable import parse_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
ALLOWED = (
    f"a safetensors file, or a folder with {SINGLE} or {INDEX}, as a run folder or a model of "
    "Hugging Face has"
)

SNAPSHOTS, MEMBERS = "snapshots", "members"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
"""How names of files end that torch.save writes."""
MARKS = (
    SINGLE, INDEX, TORCH_SINGLE, TORCH_INDEX, "adapter_config.json", "run.json", ".metadata",
)  # fmt: skip
"""Files that tell that a folder is one model."""
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*")
PART = re.compile(r".*-\d+-of-\d+\.\w+")


def find_ingredients(path: Path) -> list[Path]:
    """The models in a place, each by a path that `merge.source.open_source` takes.

    Those of a run folder are its members, by their numbers; or else its snapshots, by their steps,
    and last the model that it ended with. Of a folder that is a model itself it is that one. Of any
    other folder they are the files of weights, or the models in its folders, by their names.

    Raises:
        UserError: there are none.
    """
    members = sorted(path.glob(f"{MEMBERS}/*/"), key=_numbers)
    if members:
        return members
    snapshots = sorted(path.glob(f"{SNAPSHOTS}/*.safetensors"), key=_numbers)
    if snapshots:
        return [*snapshots, *([path] if (path / SINGLE).is_file() else [])]
    if not path.is_dir() or _is_marked(path):
        return [path]
    files = weight_files(path)
    if len(files) > 1 and not any(PART.fullmatch(file.name) for file in files):
        return files
    inner = [each for each in sorted(path.glob("*/"), key=_numbers) if _is_model(each)]
    if files or not inner:
        return [path]  # one model, or what `open_source` says is none
    return inner


def weight_files(folder: Path) -> list[Path]:
    """Files in a folder that hold weights by their names, 10 after 9: its safetensors files, or
    else those of torch.save."""
    found = [
        file
        for file in sorted(folder.iterdir(), key=_numbers)
        if file.suffix in (".safetensors", *TORCH_SUFFIXES)
        and file.is_file()
        and not file.name.startswith(".")
        and not NO_WEIGHTS.fullmatch(file.name)
    ]
    return [file for file in found if file.suffix == ".safetensors"] or found


def _is_marked(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def _is_model(folder: Path) -> bool:
    return _is_marked(folder) or bool(weight_files(folder))


def _numbers(path: Path) -> list[tuple[int, str]]:
    return natural(path.name)


def find_model_files(path: Path) -> list[Path]:
    """The files of a model: the one given, or those of a folder, by its index if there are several.

    Raises:
        UserError: there are none. CheckpointError: the index is none, or names what is not there.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is no safetensors file by its name; allowed: {ALLOWED}")
        return [path]
    if (path / INDEX).is_file():
        return indexed_files(path / INDEX)
    found = [path / SINGLE] if (path / SINGLE).is_file() else sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        what = f"{len(found)} safetensors files and no {INDEX}" if found else "no weights"
        raise UserError(
            f"{path}: there {'are' if found else 'is'} {what} there; allowed: {ALLOWED}"
        )
    return found


def indexed_files(index: Path) -> list[Path]:
    """The files that an index of weights names, in its order.

    Raises:
        CheckpointError: it is none, or names what is not beside it.
    """
    try:
        content = parse_json(index.read_bytes())
        names = list(dict.fromkeys(content["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files in other folders")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of weights: {error}; allowed: JSON with a weight_map of names of "
            "tensors to names of files"
        ) from error
    files = [index.parent / name for name in names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {missing[0].name}, and there is no such file beside it; next: copy the "
            "model again from where it is whole"
        )
    return files
