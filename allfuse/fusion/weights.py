"""Fusion of weights: every H steps, between sites that step on their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from allfuse.base.tensors import split_buckets
from allfuse.codec.memory import capture_all, restore_all
from allfuse.fusion.flight import Bundle, Flight, Load
from allfuse.fusion.fuser import Fuser
from allfuse.fusion.gradients import BUCKET_BYTES, read_state
from allfuse.rule import Mean
from allfuse.sync.outer import Average, Outer


class WeightFusion:
    """Replaces tensors by their fused value over the peers of a `site` axis.

    Phases of one round, for B bytes of tensors on n peers:
      1. `read`: copies into flat buckets; under a codec that loses something, or a rule of changes,
         what is sent is the change since the last round;
      2. `Flight.carry`: prepared by a rule that sums with this peer's weight, fused over the
         topology, all buckets under way at once: 2 (n-1)/n B bytes sent by each; a rule that sums
         finishes with the sum of weights. Rules that measure whole tensors have one in each bucket,
         and those that need the angles between them send half as much more before;
      3. `Flight.land`: the outer optimizer's step, and the copy back.

    Tensors that are not floating point (counters of batches) stay local; the outer optimizer, and
    rules of changes, are for parameters, and buffers are averaged. Before changes can be sent, or
    stepped along, the peers must agree on something: `agree()` where their values are equal, else
    the first round is neither encoded nor stepped, and a mean in place of a rule of changes.

    Args:
        names: of the tensors, under which it is kept what they were; their numbers unless given.
        outer: what becomes of fused weights.
        fragments: into how many parts the tensors are cut, each of which has rounds of its own.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        fuser: Fuser,
        *,
        names: Sequence[str] | None = None,
        outer: Outer | None = None,
        fragments: int = 1,
    ) -> None:
        named = zip(names or map(str, range(len(tensors))), tensors, strict=True)
        self.named = {name: tensor for name, tensor in named if tensor.is_floating_point()}
        self.names, self.tensors = list(self.named), list(self.named.values())
        self.fuser, self.outer = fuser, outer or Average()
        self.fragments: list[list[Bundle]] = []
        count = 0
        for numbers in cut_fragments([tensor.nbytes for tensor in self.tensors], fragments):
            held = self._bundle(numbers, count)
            count += len(held)
            self.fragments.append(held)

    def _bundle(self, numbers: list[int], count: int) -> list[Bundle]:
        """The tensors of a fragment by type; `count` bundles are before them."""
        steps, rule = not isinstance(self.outer, Average), self.fuser.fusion.rule
        most = 1 if rule.of_tensors or rule.of_changes else BUCKET_BYTES
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for number in numbers:
            tensor = self.tensors[number]
            kinds.setdefault((tensor.dtype, tensor.device), []).append(number)
        bundles: list[Bundle] = []
        for members in kinds.values():
            sizes = [self.tensors[number].nbytes for number in members]
            for places in split_buckets(sizes, most, most):
                held = [members[place] for place in places]
                names = [self.names[number] for number in held]
                tensors = [self.tensors[number] for number in held]
                bundles.append(Bundle(count + len(bundles), names, tensors, self.fuser, steps))
        return bundles

    @property
    def bundles(self) -> list[Bundle]:
        return [bundle for fragment in self.fragments for bundle in fragment]

    def agree(self) -> None:
        """The values here are those of all peers."""
        for bundle in self.bundles:
            if bundle.keeps:
                bundle.agreed = bundle.read()

    @property
    def has_agreed(self) -> bool:
        """Whether there is something to go on from in the next round, where that is needed."""
        return all(bundle.agreed is not None for bundle in self.bundles if bundle.keeps)

    def read(
        self,
        fragment: int | None = None,
        round: int = 0,
        *,
        exact: Fuser | None = None,
        late: bool = False,
    ) -> Flight:
        """The start of a round of one fragment, or of all; by `exact` it goes whole, as it is.

        `late` says that tensors will keep a share of what they hold when it lands.
        """
        encodes = exact is None and self.fuser.encodes(round)
        bundles = self.bundles if fragment is None else self.fragments[fragment]
        is_lost = any(bundle.rule.of_changes and bundle.agreed is None for bundle in bundles)
        loads = []
        for bundle in bundles:
            load = Load(bundle, bundle.read(), rule=Mean() if is_lost else bundle.rule)
            if load.rule.of_changes and bundle.agreed is not None:
                load.base = bundle.agreed
                load.flat -= load.base
            if encodes and bundle.memory is not None and bundle.agreed is not None:
                load.base, load.encoded = bundle.agreed, True
                load.flat -= load.base
                load.unsent = bundle.memory.residual.clone() if late else None
            loads.append(load)
        return Flight(loads, exact or self.fuser, round, encodes)

    def fuse(self, weights: Sequence[float], round: int = 0) -> None:
        """One round of all, in place. `weights` are those of all peers."""
        if self.fuser.link.size > 1:
            flight = self.read(round=round)
            flight.carry(weights)
            flight.land(self.outer)

    def capture(self) -> dict[str, Any] | None:
        """What is kept from round to round: live tensors. None where nothing is."""
        keeping = [bundle for bundle in self.bundles if bundle.keeps]
        if not keeping:
            return None
        agreed: dict[str, Tensor] = {}
        momentum: dict[str, Tensor] = {}
        for bundle in keeping:
            agreed |= bundle.name(bundle.agreed) if bundle.agreed is not None else {}
            momentum |= bundle.name(bundle.momentum) if bundle.momentum is not None else {}
        codec = str(self.fuser.fusion.codec)
        memories = [(b.names, b.memory) for b in keeping if b.memory is not None]
        return {"agreed": agreed, "momentum": momentum, "codec": codec, **capture_all(memories)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what is kept, as far as there is a use for it."""
        memories = [(b.names, b.memory) for b in self.bundles if b.memory is not None]
        restore_all(memories, read_state(state, self.fuser))
        for bundle in self.bundles:
            agreed = bundle.find(state["agreed"])
            if bundle.keeps and agreed is not None:
                bundle.agreed = agreed.to(bundle.tensors[0].dtype)
            momentum = bundle.find(state["momentum"])
            if bundle.steps and momentum is not None:
                bundle.momentum = momentum.to(bundle.exact)

    def revive(
        self, fragment: int | None, values: Mapping[str, Tensor], unsent: Mapping[str, Tensor]
    ) -> Flight | None:
        """A flight of a fragment, or of all, that was carried elsewhere or before a checkpoint, as
        its `values` and `unsent` tell; None if its tensors are not these."""
        loads = []
        for bundle in self.bundles if fragment is None else self.fragments[fragment]:
            flat = bundle.find(values)
            if flat is None:
                return None
            flat = flat.to(bundle.tensors[0].dtype)
            loads.append(Load(bundle, flat, unsent=bundle.find(unsent)))
        return Flight(loads, self.fuser, 0, bool(unsent))


@torch.no_grad()
def add_unsent(named: Mapping[str, Tensor], state: Mapping[str, Any], peers: int) -> None:
    """Where there is no codec any more: what one had not sent becomes part of the tensors.

    The mean over the peers then has what the sum of their residuals would have brought, exactly so
    where all weigh alike.

    Args:
        named: tensors by their names. state: what a fusion of them has captured.
    """
    for name, tensor in named.items():
        residual = state["residuals"].get(name)
        if residual is not None and residual.numel() == tensor.numel():
            tensor.add_((residual * peers).to(tensor).view(tensor.shape))


def cut_fragments(sizes: Sequence[int], fragments: int) -> list[list[int]]:
    """The numbers of tensors of so many bytes, in fragments of about as many bytes each.

    Each goes where there is least, in the order of the model: over layers of one size that makes
    the strides of Douillard et al. 2025 (arXiv:2501.18512), where a fragment has some
    of all depths. Tensors that are added at the end leave all others where they are.

    >>> cut_fragments([4, 1, 4, 1, 4, 1, 4, 1], 2)
    [[0, 3, 4, 7], [1, 2, 5, 6]]
    """
    held: list[list[int]] = [[] for _ in range(fragments)]
    bytes_of = [0] * fragments
    for number, size in enumerate(sizes):
        least = bytes_of.index(min(bytes_of))
        held[least].append(number)
        bytes_of[least] += size
    return held
