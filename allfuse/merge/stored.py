"""What pickles of torch.save say of tensors: stand-ins for storages, and views of them.

For each tensor a pickle names a function of torch that would rebuild it, with a storage, an offset,
sizes and strides (torch/_utils.py). Here the same names give a `View`. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from allfuse.merge.pickled import record

TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Names of types in a safetensors file, by those of torch."""
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
}  # fmt: skip
OTHER_TYPES = (
    "complex128", "complex32", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn_x2", "qint8", "quint8", "qint32", "quint4x2", "quint2x4",
)  # fmt: skip
OTHER_STORAGES = (
    "ComplexDoubleStorage", "QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage",
    "QUInt2x4Storage",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A type of numbers: `code` as safetensors names it, None where it does not."""

    name: str
    code: str | None


@dataclass(frozen=True)
class Storage:
    """The bytes of one tensor or several. count: items of this kind."""

    key: str
    kind: Kind
    count: int


@dataclass(frozen=True)
class View:
    """A tensor: where in a storage its numbers are, in items of its kind."""

    storage: Storage
    kind: Kind
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Unreadable:
    """A tensor that is no plain table of numbers."""

    what: str


def keep_storages(storages: dict[str, Storage]) -> Callable[[Any], Storage]:
    """Takes what a pickle says of storages, and keeps it by their keys."""

    def keep(said: Any) -> Storage:
        match said:
            case ("storage", Kind() as kind, str() | int() as key, str(), int(count)) if count >= 0:
                return storages.setdefault(str(key), Storage(str(key), kind, count))
            case ("storage", Kind() as kind, str() | int() as key, str(), int(count), None):
                return storages.setdefault(str(key), Storage(str(key), kind, count))
            case ("storage", _, _, _, _, _):
                raise ValueError("storages within storages, as torch wrote before 0.4")
        raise ValueError("something that is no storage is kept elsewhere")

    return keep


def _kinds() -> dict[tuple[str, str], Any]:
    made: dict[tuple[str, str], Any] = {}
    for name, code in TYPES.items():
        made["torch", name] = Kind(name, code)
    for name in OTHER_TYPES:
        made["torch", name] = Kind(name, None)
    for name, storage in STORAGES.items():
        made["torch", name] = made["torch.cuda", name] = Kind(name, storage)
    for name in OTHER_STORAGES:
        made["torch", name] = Kind(name, None)
    made["torch.storage", "UntypedStorage"] = made["torch", "UntypedStorage"]
    return made


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> View:
    """_rebuild_tensor and _rebuild_tensor_v2: requires_grad, hooks and flags may follow."""
    return _view(storage, storage.kind, offset, shape, strides, more[2:])


def _typed(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    kind: Any,
    *more: Any,
) -> View:
    """_rebuild_tensor_v3, of types that came later."""
    return _view(storage, kind, offset, shape, strides, more)


def _view(storage: Any, kind: Any, offset: Any, shape: Any, strides: Any, flags: Any) -> View:
    numbers = [offset, *shape, *strides]
    if not isinstance(storage, Storage) or not isinstance(kind, Kind):
        raise ValueError("a tensor without a storage")
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
        raise ValueError(f"a tensor of sizes {shape} and strides {strides} from {offset} on")
    if len(shape) != len(strides) or any(flag for flag in flags):
        raise ValueError("a tensor with flags, or with strides for other dims")
    return View(storage, kind, offset, tuple(shape), tuple(strides))


def _unreadable(what: str) -> Callable[..., Unreadable]:
    return lambda *args: Unreadable(what)


def _inner(tensor: Any, *more: Any) -> Any:
    return tensor


def _from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    return function(*args)


KNOWN: dict[tuple[str, str], Any] = {
    **_kinds(),
    ("torch", "Size"): tuple,
    ("torch", "Tensor"): record("Tensor"),
    ("torch", "device"): record("device"),
    ("torch.nn.parameter", "Parameter"): record("Parameter"),
    ("torch.nn.parameter", "Buffer"): record("Buffer"),
    ("torch.serialization", "_get_layout"): record("layout"),
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed,
    ("torch._utils", "_rebuild_parameter"): _inner,
    ("torch._utils", "_rebuild_parameter_with_state"): _inner,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _inner,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch._utils", "_rebuild_sparse_tensor"): _unreadable("a sparse tensor"),
    ("torch._utils", "_rebuild_qtensor"): _unreadable("a quantized tensor"),
    ("torch._utils", "_rebuild_nested_tensor"): _unreadable("a nested tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unreadable("a tensor without numbers"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _unreadable("a tensor of NumPy"),
}
