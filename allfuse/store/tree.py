"""A training state as plain data and named tensors, and back, equal. Nothing is pickled.

The plain data (the *skeleton*) is what JSON can hold. None, bool, str, list, finite floats and
ints of up to 64 bits stand for themselves; everything else is a JSON object with one entry, whose
key says what it is: `{"tuple": [...]}`, `{"dict": [[key, value], ...]}`, `{"float": "nan"}`,
`{"tensor": "model/layer.weight"}`.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allfuse.base.errors import CheckpointError
from allfuse.store.tensorfile import ALIKE, NAMES

MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter"}
DEEPEST = 100
_BACK = {tag: kind for kind, tag in MAPPINGS.items()}
_KINDS = "biufcSUMm"  # of NumPy: booleans, numbers, texts and times, but no objects
_NUMBERS = {"bool", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))} | {
    f"float{n}" for n in (16, 32, 64)
}


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """The skeleton of a state and its tensors by readable name, such as "model/layer.weight".

    The tensors are the live ones, detached, where they are; all else (NumPy arrays too) is copied.
    Types that a tensor file lacks are viewed as ones that it has. Tensors that share memory come
    back each with its values.

    Raises:
        CheckpointError: something in the state is of another type; says where and which.

    Example:
        >>> skeleton, tensors = pack({"step": 3, "model": {"bias": torch.zeros(2)}})
        >>> list(tensors)
        ['model/bias']
        >>> unpack(skeleton, tensors)
        {'step': 3, 'model': {'bias': tensor([0., 0.])}}
    """
    tensors: dict[str, Tensor] = {}
    return _pack(state, (), tensors), tensors


def unpack(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `pack` took apart, with the given tensors.

    Raises:
        CheckpointError: the skeleton is not one that `pack` makes, or a tensor is missing.
    """
    try:
        return _unpack(skeleton, tensors)
    except (ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"the plain part of the state is damaged: {error}") from error


def _pack(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    kind = type(value)
    if len(path) > DEEPEST:
        raise _refusal(path, f"nested deeper than {DEEPEST}, or inside itself")
    if kind in (Tensor, torch.nn.Parameter):
        return _pack_tensor(value, path, tensors)
    if kind in MAPPINGS:
        items = [
            [_pack_key(key, path), _pack(item, (*path, _word(key)), tensors)]
            for key, item in value.items()
        ]
        return {MAPPINGS[kind]: items}
    if kind is list or kind is tuple:
        entries = [_pack(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
        return entries if kind is list else {"tuple": entries}
    if kind is np.ndarray:
        return _pack_array(value, path, tensors)
    if isinstance(value, np.generic):
        _check_kind(value.dtype, path)
        return {"scalar": [value.dtype.str, value.tobytes().hex()]}
    return _pack_plain(value, path)


def _pack_plain(value: Any, path: tuple[str, ...]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    raise _refusal(path, f"a {module}{kind.__qualname__}")


def _pack_key(key: Any, path: tuple[str, ...]) -> Any:
    if type(key) is tuple:
        return {"tuple": [_pack_key(part, path) for part in key]}
    return _pack_plain(key, (*path, _word(key)))


def _pack_tensor(value: Tensor, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    dtype = value.dtype
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
        raise _refusal(path, f"a {value.layout} tensor of {dtype} on {value.device}")
    name = _name(path, tensors)
    tensor = value.detach()
    if dtype in NAMES and not dtype.is_complex:
        tensors[name] = tensor.resolve_neg() if tensor.is_neg() else tensor
        return {"tensor": name}
    if dtype.is_complex:
        tensors[name] = torch.view_as_real(tensor.resolve_conj().resolve_neg())
    else:
        tensors[name] = tensor.view(ALIKE[dtype.itemsize])
    return {"viewed": [name, str(dtype).removeprefix("torch.")]}


def _pack_array(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    _check_kind(value.dtype, path)
    copied = np.array(value, order="C")
    if copied.dtype.name not in _NUMBERS or not copied.dtype.isnative:
        copied = copied.reshape(-1).view(np.uint8)
    name = _name(path, tensors)
    tensors[name] = torch.from_numpy(copied)
    return {"array": [name, value.dtype.str, list(value.shape)]}


def _check_kind(dtype: np.dtype[Any], path: tuple[str, ...]) -> None:
    if dtype.kind not in _KINDS:
        raise _refusal(path, f"a NumPy value of type {dtype}")


def _refusal(path: tuple[str, ...], what: str) -> CheckpointError:
    place = f"at {'/'.join(path[:8])!r}" if path else "as a whole"
    return CheckpointError(
        f"the state {place} is {what}, which a checkpoint cannot hold; "
        "allowed are dict, list, tuple, None, bool, int, float, str, bytes, dense torch "
        "tensors and NumPy arrays and scalars: convert it, or leave it out of the state"
    )


def _word(key: Any) -> str:
    """A key as part of a name. "/" parts names, so one inside a key is written "~1"."""
    if type(key) is str and key.isidentifier():
        return key
    text = str(key).encode(errors="backslashreplace").decode()
    return text.replace("~", "~0").replace("/", "~1")


def _name(path: tuple[str, ...], taken: Mapping[str, Tensor]) -> str:
    """A name that is not taken yet: the keys 0 and "0" of one dict would have the same."""
    base = name = "/".join(path) or "state"
    count = 1
    while name in taken or name == "__metadata__":
        count += 1
        name = f"{base}#{count}"
    return name


def _unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if isinstance(node, list):
        return [_unpack(item, tensors) for item in node]
    if not isinstance(node, dict) or len(node) != 1:
        raise ValueError("an object must have one entry")
    match next(iter(node.items())):
        case "tuple", list() as items:
            return tuple([_unpack(item, tensors) for item in items])
        case str(tag), list() as items if tag in _BACK:
            pairs = [(_unpack(key, {}), _unpack(value, tensors)) for key, value in items]
            return _BACK[tag](dict(pairs))
        case "int", str(text):
            return int(text, 16)
        case "float", ("nan" | "inf" | "-inf") as text:
            return float(text)
        case "bytes", str(text):
            return base64.b64decode(text, validate=True)
        case "tensor", str(name):
            return _find(name, tensors)
        case "viewed", [str(name), str(dtype)]:
            return _unview(_find(name, tensors), dtype)
        case "array", [str(name), str(dtype), list(shape)]:
            raw = _find(name, tensors).contiguous().numpy().reshape(-1)
            return raw.view(_numpy_type(dtype)).reshape(shape)
        case "scalar", [str(dtype), str(text)]:
            return np.ndarray((), _numpy_type(dtype), bytes.fromhex(text))[()]
        case tag, _:
            raise ValueError(f"nothing that is written as {tag!r}")


def _find(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the tensor {name!r} is missing")
    return tensors[name]


def _unview(tensor: Tensor, dtype: str) -> Tensor:
    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype):
        raise ValueError(f"there is no type torch.{dtype}")
    return torch.view_as_complex(tensor) if wanted.is_complex else tensor.view(wanted)


def _numpy_type(text: str) -> np.dtype[Any]:
    dtype = np.dtype(text)
    if dtype.kind not in _KINDS:
        raise ValueError(f"no NumPy values of type {dtype} are written")
    return dtype
