"""Finds where a model can be cut between its layers' channels.

A region begins at maps that are cut by the channels they give (columns), goes through whatever
passes the cut on, and ends at maps cut by the channels they take (rows), whose outputs are summed:
two sums for each region, one forward and one backward (Shoeybi et al. 2019, arXiv:1909.08053,
section 3). Which maps those are is found by following the model's own calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from allfuse.base.errors import UserError
from allfuse.split.record import Call, Recording, draws
from allfuse.split.tensor.agree import agreeing, edited, said, telling_apart
from allfuse.split.tensor.cut import Cut, Passing, Size
from allfuse.split.tensor.maps import Map, find_map

Way = Literal["columns", "rows", "gathered", "late", "vocabulary"]

PACKED = (3, 2)
"""How many things of one size are often packed into a weight: queries, keys and values; halves."""

LEAST_SHARE = 0.02
"""Of all parameters, which a map that stands alone must hold to be cut: its outputs have to be
gathered, and so pay less."""


@dataclass(frozen=True)
class Use:
    """How one call of a map is cut.

    Attributes:
        way: columns and rows as said above; gathered: by the channels it gives, which are put
            together at once; late: likewise, put together where something asks for the whole;
            vocabulary: a table of embeddings cut by its rows.
        cut: of its weight.
    """

    map: Map
    way: Way
    cut: Cut


@dataclass
class TensorPlan:
    """How a model is cut into n slices.

    Attributes:
        uses: of each call that is cut, by its index.
        cuts: of each parameter and buffer that is cut, by name.
        values: likewise of each value within a region, by its number.
        partial: parameters that stay whole and of whose gradient each rank has a part.
        sizes: by module, arguments of its calls that are smaller for a slice: the name of the
            function, the place of the argument, and what it is for the whole.
        random: by module, whether each of its calls that draw at random, in order, is within a
            region, where slices draw what differs.
        reasons: by module, why a map is in no region.
        whole: modules whose maps are left whole.
        regions: columns and rows that belong together, by weight.
    """

    n: int
    uses: dict[int, Use] = field(default_factory=dict)
    cuts: dict[str, Cut] = field(default_factory=dict)
    values: dict[int, Cut] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    sizes: dict[str, set[tuple[str, int, Size]]] = field(default_factory=dict)
    random: dict[str, list[bool]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    regions: list[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=list)


class NoCut(Exception):
    """Why a region cannot be cut, and how many calls it got to."""

    def __init__(self, reason: str, calls: int = 0) -> None:
        super().__init__(reason)
        self.calls = calls


@dataclass
class Region:
    """Maps between which channels are cut, and what lies there."""

    columns: list[tuple[Map, Cut]]
    rows: list[tuple[Map, Cut]] = field(default_factory=list)
    cuts: dict[str, Cut] = field(default_factory=dict)
    values: dict[int, Cut] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    sizes: list[tuple[Call, int, Size]] = field(default_factory=list)
    random: set[int] = field(default_factory=set)


class Search:
    """Looks for regions in a recording.

    Args:
        keep: parameters that are to stay whole, with the reason.
        also: those that are cut however small they are.
    """

    def __init__(
        self, recording: Recording, n: int, keep: Mapping[str, str], also: Collection[str] = ()
    ) -> None:
        self.recording, self.n, self.also = recording, n, also
        self.keep = {**edited(recording), **keep}
        self.passing = Passing(recording, n)
        found = [find_map(recording, call) for call in recording.calls]
        self.maps = {each.call.index: each for each in found if each is not None}
        self.learned, self.needed = recording.learned(), recording.needed()
        self.plan = TensorPlan(n)
        self._taken: set[int] = set()
        self._why: dict[int, str] = {}
        self._drawing: set[int] = set()  # calls within regions

    def run(self) -> TensorPlan:
        regions = []
        for each in self.maps.values():
            if each.kind != "embedding" and each.call.index not in self._taken:
                region = self._region_before(each)
                if region is not None:
                    regions.append(region)
                    ends = [*region.columns, *region.rows]
                    self._taken |= {end.call.index for end, _ in ends}
        for region in telling_apart(
            agreeing(regions, self.maps, self._why), self.recording, self._why
        ):
            self._accept(region)
        self._cut_alone()
        self._note_draws()
        for index, each in self.maps.items():
            reason = self._why.get(index)
            if reason is not None:
                self.plan.reasons.setdefault(_owner(each.weight), reason)
            if index not in self.plan.uses:
                self.plan.whole.setdefault(_owner(each.weight), reason or "nothing takes it cut")
        return self.plan

    def _note_draws(self) -> None:
        modules = {self.recording.calls[index].module for index in self._drawing}
        for call in self.recording.calls:
            if call.module in modules and draws(call.function):
                self.plan.random.setdefault(call.module, []).append(call.index in self._drawing)

    def _region_before(self, last: Map) -> Region | None:
        """The region that ends at a map, and at others maybe."""
        begins = self._sources(last.x)
        weights = [name for each in begins for name in (each.weight, each.bias)]
        reason = None
        if last.weight in self.keep:
            reason = self.keep[last.weight]
        elif kept := [name for name in weights if name is not None and name in self.keep]:
            reason = f"{_owner(kept[0])} stays whole"
        elif not begins:
            reason = "no map stands before it"
        elif any(each.kind == "embedding" or each.call.index in self._taken for each in begins):
            reason = "what it takes is needed whole"
        reasons = [] if reason is None else [NoCut(reason)]
        for packed in self._packings(begins) if reason is None else ():
            try:
                return self._follow(begins, packed)
            except NoCut as error:
                reasons.append(error)
        self._why.setdefault(last.call.index, str(max(reasons, key=lambda each: each.calls)))
        return None

    def _sources(self, value: int) -> list[Map]:
        """The maps that a value comes from, with no other map in between."""
        seen: set[int] = set()
        found: dict[int, Map] = {}
        waiting = [value]
        while waiting:
            call = self.recording.makers.get(waiting.pop())
            if call is None or call.index in seen:
                continue
            seen.add(call.index)
            if call.index in self.maps:
                found[call.index] = self.maps[call.index]
            else:
                waiting += call.inputs
        return [found[index] for index in sorted(found)]

    def _packings(self, begins: Sequence[Map]) -> list[dict[int, Cut]]:
        """How the outputs of maps may be cut: as one thing; or two, three, or as calls split them
        that come later; and where n does not divide them, in the units in which they are used."""
        packed = self._parts(begins)
        sizes = {each.call.index: self._channels(each) for each in begins}
        dims = {each.call.index: each.y_dim for each in begins}
        units = [1]
        if not all(Cut(0, parts).is_even(self.n) for each in packed for parts in each.values()):
            shapes = [
                self.recording.shapes[i] for c in self._calls_after(begins) for i in c.outputs
            ]
            units += [
                shape[-1] for shape in shapes if shape and 1 < shape[-1] < max(sizes.values())
            ]
        return [
            {
                i: Cut(dims[i], p, unit if all(size % unit == 0 for size in p) else 1)
                for i, p in parts.items()
            }
            for parts in packed
            for unit in dict.fromkeys(units)
        ]

    def _parts(self, begins: Sequence[Map]) -> list[dict[int, tuple[int, ...]]]:
        """What may be packed into the outputs of maps, by sizes."""
        sizes = {each.call.index: self._channels(each) for each in begins}
        found: list[dict[int, tuple[int, ...]]] = [{i: (size,) for i, size in sizes.items()}]
        for call in self._calls_after(begins):
            if len(call.outputs) > 1:
                shapes = [self.recording.shapes[number] for number in call.outputs]
                parts = tuple(shape[-1] for shape in shapes if shape)
                found.append({i: parts if sum(parts) == s else (s,) for i, s in sizes.items()})
        found = [each for at, each in enumerate(found) if each not in found[:at]]
        return found + [
            {i: (s // k,) * k if s % k == 0 else (s,) for i, s in sizes.items()} for k in PACKED
        ]

    def _calls_after(self, begins: Sequence[Map]) -> Iterable[Call]:
        """Calls that take what the maps give, directly or through others, up to the next maps."""
        reached = {each.output for each in begins}
        for call in self.recording.calls:
            if reached.intersection(call.inputs) and call.index not in self.maps:
                reached.update(call.outputs)
                yield call

    def _channels(self, each: Map) -> int:
        return self.recording.shapes[each.output][each.y_dim]

    def _follow(self, begins: Sequence[Map], packed: Mapping[int, Cut]) -> Region:
        """The region that begins at these maps.

        Raises:
            NoCut: something mixes the channels, or needs them whole.
        """
        region = Region([])
        cuts: dict[int, Cut] = {}
        for each in begins:
            cut = packed[each.call.index]
            if not cut.reaches(self.n):
                channels = " + ".join(str(part // cut.unit) for part in cut.parts)
                units = f" of {cut.unit}" if cut.unit > 1 else ""
                raise NoCut(
                    f"the {channels} channels{units} of {_owner(each.weight)} are fewer than "
                    f"{self.n}"
                )
            cuts[each.output] = cut
            region.columns.append((each, Cut(each.out_of, cut.parts * each.packs, cut.unit)))
        first = {each.call.index for each in begins}
        for call in self.recording.calls:
            mine = {number: cuts[number] for number in call.inputs if number in cuts}
            if call.index in first or not mine or not self.needed.intersection(call.outputs):
                continue
            end = self.maps.get(call.index)
            if end is not None:
                region.rows.append((end, self._end_at(end, mine)))
            else:
                cuts |= self._pass(call, mine, region)
        if reached := [number for number in self.recording.outputs if number in cuts]:
            shape = self.recording.shapes[reached[0]]
            raise NoCut(
                f"the model returns what would be cut, of shape {shape}", len(self.recording.calls)
            )
        if not region.rows:
            raise NoCut("nothing takes what would be cut", len(self.recording.calls))
        region.values = cuts
        return region

    def _end_at(self, end: Map, mine: Mapping[int, Cut]) -> Cut:
        cut = mine.get(end.x)
        if (
            len(mine) > 1
            or cut is None
            or cut.dim != end.x_dim
            or end.kind in ("embedding", "packed")
        ):
            reason = f"{_owner(end.weight)} takes what would be cut in another dim"
            raise NoCut(reason, end.call.index)
        return Cut(end.into, cut.parts, cut.unit)

    def _pass(self, call: Call, mine: Mapping[int, Cut], region: Region) -> dict[int, Cut]:
        """The cuts of what a call gives."""
        names = self.recording.parameters | self.recording.buffers
        for number in call.inputs:
            if number in self.learned and number not in mine and number not in names:
                reason = f"{said(call)} takes a value beside it that is learned and not cut"
                raise NoCut(reason, call.index)
        passed = self.passing.through(call, mine)
        if passed is None:
            shapes = ", ".join(str(self.recording.shapes[i]) for i in call.outputs[:1])
            uneven = [cut for cut in mine.values() if not cut.is_even(self.n)]
            sizes = " + ".join(map(str, uneven[0].parts)) if uneven else ""
            why = f", whose {sizes} are not divisible by {self.n}" if uneven else ""
            raise NoCut(f"{said(call)} mixes the channels{why}, to shape {shapes}", call.index)
        for number in passed.parameters:
            if names[number] in self.keep:
                raise NoCut(f"{_owner(names[number])} stays whole", call.index)
        region.cuts |= {names[number]: cut for number, cut in passed.parameters.items()}
        region.partial |= {names[i] for i in passed.whole if i in self.recording.parameters}
        for place, size in passed.sizes.items():
            region.sizes.append((call, place, size))
        if draws(call.function):
            region.random.add(call.index)
        outputs = zip(call.outputs, passed.outputs, strict=True)
        return {number: cut for number, cut in outputs if cut is not None}

    def _accept(self, region: Region) -> None:
        plan = self.plan
        for each, cut in region.columns:
            plan.uses[each.call.index] = Use(each, "columns", cut)
            plan.cuts[each.weight] = cut
            if each.bias is not None:
                plan.cuts[each.bias] = Cut(0, cut.parts, cut.unit)
        for each, cut in region.rows:
            plan.uses[each.call.index] = Use(each, "rows", cut)
            plan.cuts[each.weight] = cut
        plan.cuts |= region.cuts
        plan.values |= region.values
        plan.partial |= region.partial
        self._drawing |= region.random
        for call, place, size in region.sizes:
            plan.sizes.setdefault(call.module, set()).add((call.name, place, size))
        names = tuple(each.weight for each, _ in region.columns)
        plan.regions.append((names, tuple(each.weight for each, _ in region.rows)))

    def _cut_alone(self) -> None:
        """Large maps that are in no region: embeddings by their rows, others by what they give."""
        shapes = {name: self.recording.shapes[i] for i, name in self.recording.parameters.items()}
        total = sum(_count(shape) for shape in shapes.values())
        by_weight: dict[str, list[Map]] = {}
        for index, each in self.maps.items():
            if index not in self.plan.uses and each.weight not in self.plan.cuts:
                by_weight.setdefault(each.weight, []).append(each)
        for weight, maps in by_weight.items():
            reason = self._keeps_whole(weight, maps, shapes[weight], total)
            if reason is not None:
                for each in maps:
                    before = self._why.get(each.call.index)
                    both = before is not None and before != reason
                    self._why[each.call.index] = f"{before}; {reason}" if both else reason
                continue
            dim = 0 if maps[0].kind == "embedding" else maps[0].out_of
            cut = Cut(dim, (shapes[weight][dim],))
            self.plan.cuts[weight] = cut
            for each in maps:
                way = self._way_alone(each)
                self.plan.uses[each.call.index] = Use(each, way, cut)
                if way != "vocabulary" and each.bias is not None:
                    self.plan.cuts[each.bias] = Cut(0, cut.parts)

    def _way_alone(self, each: Map) -> Way:
        """What the last map gives goes to a loss, which may do without the whole; others go on with
        it."""
        if each.kind == "embedding":
            return "vocabulary"
        reached = {each.output}
        for call in self.recording.calls[each.call.index + 1 :]:
            if reached.intersection(call.inputs):
                if call.index in self.maps:
                    return "gathered"
                reached.update(call.outputs)
        return "late"

    def _keeps_whole(
        self, weight: str, maps: Sequence[Map], shape: tuple[int, ...], total: int
    ) -> str | None:
        """Why a map that stands alone is not cut. None where it is."""
        if weight in self.keep:
            return self.keep[weight]
        if weight not in self.also and _count(shape) < LEAST_SHARE * total:
            return f"alone it has {_count(shape) / total:.1%} of the parameters"
        dims = {0 if each.kind == "embedding" else each.out_of for each in maps}
        if len(dims) > 1:
            return "its uses would cut it in two ways"
        size = shape[dims.pop()]
        if size < self.n:
            return f"its {size} rows are fewer than {self.n}"
        return None


def find_cuts(
    recording: Recording,
    n: int,
    keep: Mapping[str, str] | None = None,
    also: Collection[str] = (),
) -> TensorPlan:
    """How a model is cut into n slices.

    Args:
        keep: parameters that stay whole, with the reason.
        also: those that are cut however small they are.

    Raises:
        UserError: one of `also` cannot be cut.
    """
    found = Search(recording, n, keep or {}, also).run()
    for weight in also:
        reason = found.whole.get(_owner(weight))
        if reason is not None and weight not in found.cuts:
            raise UserError(
                f"cut_also: {_owner(weight)} cannot be cut into {n} slices: {reason}; next: leave "
                "it out of cut_also"
            )
    return found


def _owner(parameter: str) -> str:
    """The module that holds a parameter."""
    return parameter.rpartition(".")[0] or "the model"


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
