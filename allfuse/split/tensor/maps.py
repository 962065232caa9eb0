"""Calls that multiply by a weight: linear maps, convolutions, and tables of embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from allfuse.split.record import Call, Recording, Ref

Kind = Literal["linear", "packed", "addmm", "matmul", "conv", "embedding"]
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class Map:
    """A call that maps channels to channels by a weight.

    Attributes:
        x: the value that is mapped. output: what comes out.
        weight, bias: names of parameters.
        into, out_of: dims of the weight that hold the channels it takes and gives.
        x_dim, y_dim: dims of x and of the output that hold them.
        spatial: dims after those, which hold no channels.
        packs: how many weights lie one after the other in the tensor, of which this takes one.
    """

    call: Call
    kind: Kind
    x: int
    weight: str
    bias: str | None
    into: int
    out_of: int
    x_dim: int
    y_dim: int
    spatial: int = 0
    packs: int = 1

    @property
    def output(self) -> int:
        return self.call.outputs[0]


def find_map(recording: Recording, call: Call) -> Map | None:
    """The map that a call is, if it is one whose weight is a parameter."""
    match call.name:
        case "linear":
            x, weight, bias = call.bound("input", "weight", "bias")
            return _map(recording, call, "linear", x, weight, bias, into=1, out_of=0)
        case "project":
            x, weight, bias, _, packs = call.arguments[0]
            return _map(recording, call, "packed", x, weight, bias, into=1, out_of=0, packs=packs)
        case "addmm" if len(call.arguments[0]) == 3 and not call.arguments[1]:
            bias, x, weight = call.arguments[0]
            return _map(recording, call, "addmm", x, weight, bias, into=0, out_of=1)
        case "matmul" | "__matmul__" if len(call.arguments[0]) == 2:
            x, weight = call.arguments[0]
            if isinstance(weight, Ref) and len(recording.shapes[weight.number]) == 2:
                return _map(recording, call, "matmul", x, weight, None, into=0, out_of=1)
        case "embedding":
            x, weight, _, longest, _, by_frequency, sparse = call.bound(
                "input",
                "weight",
                "padding_idx",
                "max_norm",
                "norm_type",
                "scale_grad_by_freq",
                "sparse",
            )
            if longest is not None or by_frequency or sparse:
                return None
            return _map(recording, call, "embedding", x, weight, None, into=0, out_of=1)
        case name if name in CONVOLUTIONS:
            x, weight, bias, _, _, _, groups = call.bound(
                "input", "weight", "bias", "stride", "padding", "dilation", "groups"
            )
            if groups not in (None, 1):
                return None
            return _map(recording, call, "conv", x, weight, bias, into=1, out_of=0)
    return None


def _map(
    recording: Recording,
    call: Call,
    kind: Kind,
    x: object,
    weight: object,
    bias: object,
    *,
    into: int,
    out_of: int,
    packs: int = 1,
) -> Map | None:
    names = recording.parameters
    if not (isinstance(x, Ref) and isinstance(weight, Ref) and weight.number in names):
        return None
    if isinstance(bias, Ref) and bias.number not in names:
        return None
    last = len(recording.shapes[call.outputs[0]]) - 1
    spatial = len(recording.shapes[weight.number]) - 2 if kind == "conv" else 0
    return Map(
        call=call,
        kind=kind,
        x=x.number,
        weight=names[weight.number],
        bias=names[bias.number] if isinstance(bias, Ref) else None,
        into=into,
        out_of=out_of,
        x_dim=len(recording.shapes[x.number]) - 1 - spatial,
        y_dim=last - spatial,
        spatial=spatial,
        packs=packs,
    )
