"""In which safetensors files a model's weights are. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from allfuse.base.errors import CheckpointError, UserError
from allfuse.store.durable import parse_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ALLOWED = (
    f"a safetensors file, or a folder with {SINGLE} or {INDEX}, as a run folder or a model of "
    "Hugging Face has"
)


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
        return _indexed(path / INDEX)
    found = [path / SINGLE] if (path / SINGLE).is_file() else sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        what = f"{len(found)} safetensors files and no {INDEX}" if found else "no weights"
        raise UserError(
            f"{path}: there {'are' if found else 'is'} {what} there; allowed: {ALLOWED}"
        )
    return found


def _indexed(index: Path) -> list[Path]:
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
