"""What servers hold, in plain values: the tensors, and which optimizer steps each group of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from allfuse.base.choice import build
from allfuse.base.errors import PlanError, UserError
from allfuse.codec import CODECS, Codec, MessageCodec
from allfuse.fusion.weights import cut_fragments
from allfuse.link.post import Malformed
from allfuse.plan.parse import read_call
from allfuse.roles.cutting import Block
from allfuse.roles.elementwise import check_optimizer, find_class, is_option, to_plain
from allfuse.split.piece import Piece

Pushed: TypeAlias = Literal["gradient", "change"]
"""gradient: of the loss. change: weights as read less weights now, which is a gradient for the
optimizer that steps replicas' weights, and the whole story for buffers."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_BYTES = 1 << 44
MOST_FRAGMENTS = 1 << 20
MOST_RANKS = 1 << 16


class Part(NamedTuple):
    """Where a tensor lies in one of the plain model. of: the name of that."""

    of: str
    piece: Piece


@dataclass(frozen=True)
class Held:
    """A tensor that servers hold.

    ranks: of a worker, that have it; more than one rank only where they share the model. part: of
    which tensor of the plain model it is a part; None where it is one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int
    ranks: tuple[int, ...] = (0,)
    part: Part | None = None


@dataclass(frozen=True)
class Group:
    """Tensors that one optimizer steps.

    optimizer: a class of torch.optim. options: its plain arguments. fragment: of the weights, that
    these tensors are of: those of one are pushed and sent together.
    """

    optimizer: str
    options: Mapping[str, Any]
    pushed: Pushed = "gradient"
    fragment: int = 0


@dataclass(frozen=True)
class Blueprint:
    """All that servers need to know of a model. Optimizers begin without a past.

    codec: of updates and of weights on the way.

    Example:
        blueprint = Blueprint.of_gradients(optimizer, model.named_parameters())
        assert Blueprint.from_plain(blueprint.plain()) == blueprint
    """

    tensors: tuple[Held, ...]
    groups: tuple[Group, ...]
    codec: str = "identity"

    @classmethod
    def of_gradients(
        cls,
        optimizer: Optimizer,
        parameters: Iterable[tuple[str, Parameter]],
        buffers: Iterable[tuple[str, Tensor]] = (),
        *,
        codec: str = "identity",
        share: float = 1.0,
    ) -> Blueprint:
        """Of a model whose gradients are pushed.

        Frozen parameters and buffers that are not floating point are not held: they are the
        workers' own. Floating buffers become the mean of what workers make of them.

        Args:
            optimizer: whose parameters and options servers take; its state is not.
            share: of a push in the value of a buffer: 1 where the pushes of all workers are
                averaged, 1 / workers where each is applied by itself.

        Raises:
            UserError: an optimizer that is not per element, a parameter without a name, or one of
                a type that servers do not hold.
            PlanError: a codec whose messages are sums.
        """
        names = {id(parameter): name for name, parameter in parameters}
        tensors: list[Held] = []
        groups: list[Group] = []
        for number, options in enumerate(optimizer.param_groups):
            plain = to_plain(options, type(optimizer))
            check_optimizer(type(optimizer), plain)
            groups.append(Group(type(optimizer).__name__, plain))
            for parameter in options["params"]:
                if not parameter.requires_grad:
                    continue
                if id(parameter) not in names:
                    raise UserError(
                        f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that "
                        "the model does not name; allowed: parameters of the model; next: make "
                        "the optimizer of model.parameters()"
                    )
                tensors.append(_held(names[id(parameter)], parameter, number))
        return cls._with_buffers(tensors, groups, buffers, codec, share)

    @classmethod
    def of_changes(
        cls,
        parameters: Iterable[tuple[str, Tensor]],
        buffers: Iterable[tuple[str, Tensor]] = (),
        *,
        optimizer: str = "SGD",
        options: Mapping[str, Any],
        codec: str = "identity",
        share: float = 1.0,
        fragments: int = 1,
    ) -> Blueprint:
        """Of a model whose sites step on their own and push what that changed.

        Args:
            optimizer: the outer one; SGD with lr=1 over averaged changes is the average of sites.
            fragments: into how many parts the tensors are cut, as by `cut_fragments`; each has a
                group of its own, and another one for its buffers.

        Raises:
            UserError, PlanError: as `of_gradients`; more fragments than tensors.
        """
        found = find_class(optimizer)
        if found is None:
            raise UserError(f"there is no torch.optim.{optimizer}")
        check_optimizer(found, options)
        parameters, buffers = list(parameters), _floating(buffers)
        homes = _fragments_of([*parameters, *buffers], fragments)
        tensors = [_held(name, tensor, homes[name]) for name, tensor in parameters]
        groups = [Group(optimizer, dict(options), "change", n) for n in range(fragments)]
        return cls._with_buffers(tensors, groups, buffers, codec, share, homes)

    @classmethod
    def _with_buffers(
        cls,
        tensors: list[Held],
        groups: list[Group],
        buffers: Iterable[tuple[str, Tensor]],
        codec: str,
        share: float,
        homes: Mapping[str, int] | None = None,
    ) -> Blueprint:
        """homes: the fragment of each buffer, by name; 0 where it is not told."""
        floating, homes = _floating(buffers), homes or {}
        found = sorted({homes.get(name, 0) for name, _ in floating})
        numbers = {fragment: number for number, fragment in enumerate(found, len(groups))}
        for name, buffer in floating:
            tensors.append(_held(name, buffer, numbers[homes.get(name, 0)]))
        groups += [Group("SGD", {"lr": float(share)}, "change", fragment) for fragment in numbers]
        read_codec(codec)
        return cls(tuple(tensors), tuple(groups), codec)

    def parted(self, pieces: Mapping[str, Sequence[Piece | None]]) -> Blueprint:
        """The same where ranks of a worker share the model: of each tensor what ranks have of it,
        each part once.

        Args:
            pieces: of each tensor by name, what each rank has; None is nothing.
        """
        tensors = [part for held in self.tensors for part in _parts_of(held, pieces[held.name])]
        return Blueprint(tuple(tensors), self.groups, self.codec)

    @cached_property
    def parts(self) -> Mapping[str, tuple[Held, ...]]:
        """What makes up each tensor of the plain model, by its name."""
        found: dict[str, list[Held]] = {}
        for held in self.tensors:
            found.setdefault(held.part.of if held.part else held.name, []).append(held)
        return {name: tuple(parts) for name, parts in found.items()}

    @cached_property
    def fragments(self) -> int:
        """Into how many parts the weights are cut that travel by themselves."""
        return max((group.fragment for group in self.groups), default=0) + 1

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Tensors of one group and type that the same ranks have end to end, in the order in which
        they are first met."""
        found: dict[tuple[int, torch.dtype, tuple[int, ...]], list[Held]] = {}
        for held in self.tensors:
            found.setdefault((held.group, held.dtype, held.ranks), []).append(held)
        return tuple(
            Block(
                group,
                dtype,
                tuple(h.name for h in held),
                tuple(h.shape for h in held),
                self.groups[group].fragment,
                ranks,
            )
            for (group, dtype, ranks), held in found.items()
        )

    def pushes_changes(self, block: int) -> bool:
        return self.groups[self.blocks[block].group].pushed == "change"

    def changed_options(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """For each group, the options that are not what they were when this was made.

        Raises:
            UserError: groups were added.
        """
        own = [group for group in self.groups if group.pushed == "gradient"]
        if len(own) != len(optimizer.param_groups):
            raise UserError(
                f"the optimizer has {len(optimizer.param_groups)} groups, servers hold {len(own)}; "
                "next: add all groups before training"
            )
        changed: list[dict[str, Any]] = [{} for _ in self.groups]
        for number, options in enumerate(optimizer.param_groups):
            now = to_plain(options, type(optimizer))
            before = own[number].options
            changed[number] = {k: v for k, v in now.items() if before.get(k) != v}
        return changed

    def plain(self) -> dict[str, Any]:
        """As lists, dicts, numbers and texts."""
        return {
            "tensors": [_held_to_plain(held) for held in self.tensors],
            "groups": [_group_to_plain(group) for group in self.groups],
            "codec": self.codec,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Blueprint:
        """From what `plain` gives.

        Raises:
            Malformed: it is something else, or an optimizer or codec that servers cannot run.
        """
        try:
            groups = tuple(_read_group(each) for each in plain["groups"])
            tensors = tuple(_read_held(each, len(groups)) for each in plain["tensors"])
            names = {held.name for held in tensors}
            total = sum(prod(held.shape) * held.dtype.itemsize for held in tensors)
            if len(names) < len(tensors) or total > MOST_BYTES or len(plain) != 3:
                raise ValueError("names that come twice, too many bytes, or strange entries")
            read_codec(plain["codec"])
            return cls(tensors, groups, plain["codec"])
        except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
            raise Malformed(f"a blueprint that cannot be: {error}") from error

    @cached_property
    def digest(self) -> str:
        """Equal for equal blueprints."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:16]


def _floating(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]


def _fragments_of(tensors: Sequence[tuple[str, Tensor]], fragments: int) -> dict[str, int]:
    """The fragment of each tensor, by its name.

    Raises:
        PlanError: there are more fragments than tensors.
    """
    if fragments > max(len(tensors), 1):
        raise PlanError(
            f"fragments={fragments}",
            f"fragments are of whole tensors, and there are {len(tensors)}",
            f"fragments={len(tensors)}",
        )
    cut = cut_fragments([tensor.nbytes for _, tensor in tensors], fragments)
    return {tensors[number][0]: fragment for fragment, held in enumerate(cut) for number in held}


def _group_to_plain(group: Group) -> dict[str, Any]:
    plain = {"optimizer": group.optimizer, "options": dict(group.options), "pushed": group.pushed}
    return {**plain, "fragment": group.fragment} if group.fragment else plain


def _held(name: str, tensor: Tensor, group: int) -> Held:
    if tensor.dtype not in NAMES:
        raise UserError(
            f"{name} is of {tensor.dtype}, which servers do not hold; allowed: {', '.join(DTYPES)}"
        )
    return Held(name, tuple(tensor.shape), tensor.dtype, group)


def _held_to_plain(held: Held) -> list[Any]:
    plain = [held.name, list(held.shape), NAMES[held.dtype], held.group]
    if held.ranks == (0,) and held.part is None:
        return plain
    part = held.part and [held.part.of, held.part.piece.plain()]
    return [*plain, list(held.ranks), part]


def _parts_of(held: Held, pieces: Sequence[Piece | None]) -> list[Held]:
    """What ranks have of a tensor, each part once."""
    ranks: dict[Piece, list[int]] = {}
    for rank, piece in enumerate(pieces):
        if piece is not None and (0 not in piece.own or 0 in held.shape):
            ranks.setdefault(piece, []).append(rank)
    found = []
    for number, (piece, own) in enumerate(ranks.items()):
        if piece.own == held.shape:
            return [replace(held, ranks=tuple(own))]
        part = Part(held.name, piece)
        name = f"{held.name}:{number}"
        found.append(Held(name, piece.own, held.dtype, held.group, tuple(own), part))
    return found


def _read_group(plain: Any) -> Group:
    name, options, pushed = plain["optimizer"], plain["options"], plain["pushed"]
    found = find_class(name) if isinstance(name, str) else None
    fragment = plain.get("fragment", 0)
    if found is None or pushed not in get_args(Pushed) or len(plain) != 3 + ("fragment" in plain):
        raise ValueError(f"optimizer {name!r}, pushed {pushed!r}")
    if type(fragment) is not int or not 0 <= fragment < MOST_FRAGMENTS:
        raise ValueError(f"fragment {fragment!r}")
    if not all(isinstance(key, str) and is_option(value) for key, value in options.items()):
        raise ValueError(f"options of {name}")
    check_optimizer(found, options)
    return Group(name, dict(options), pushed, fragment)


def _read_held(plain: Any, groups: int) -> Held:
    name, shape, dtype, group, *more = plain
    sizes = [size for size in shape if type(size) is int and size >= 0]
    if not isinstance(name, str) or len(sizes) < len(shape) or len(shape) > 64:
        raise ValueError(f"tensor {name!r} of shape {shape!r}")
    if type(group) is not int or not 0 <= group < groups:
        raise ValueError(f"tensor {name!r} of group {group!r}")
    if not more:
        return Held(name, tuple(sizes), DTYPES[dtype], group)
    ranks, told = more
    if not ranks or not all(type(n) is int and 0 <= n < MOST_RANKS for n in ranks):
        raise ValueError(f"tensor {name!r} of ranks {ranks!r}")
    part = None if told is None else Part(str(told[0]), Piece.of(told[1]))
    if part is not None and part.piece.own != tuple(sizes):
        raise ValueError(f"tensor {name!r} of shape {shape!r} for a piece of {part.piece.own}")
    return Held(name, tuple(sizes), DTYPES[dtype], group, tuple(ranks), part)


def read_codec(text: str) -> MessageCodec | None:
    """The codec that a text names; None where nothing is encoded.

    Raises:
        PlanError: it cannot be read, or its messages are sums, which have no meaning at a server.
    """
    call = read_call(text)
    codec: Codec = build("codec", CODECS, call.name, call.args, call.kwargs)
    if isinstance(codec, MessageCodec):
        return codec
    if codec.lossless:
        return None
    fitting = [name for name, cls in CODECS.items() if issubclass(cls, MessageCodec)]
    raise PlanError(
        f"codec={text}",
        "its encoded values are summed by all peers together, which servers do not do",
        allowed=", ".join(["identity", *fitting]),
    )
