"""The stages in which one tensor is fused, block by block.

    1. turns of the sift: each model's statistics, summed over the blocks
    2. turns of rules that measure all models together, such as their Gram matrix
    3. each block: read, changed to changes, sifted, fused, added to the base, written

Blocks of a stage can go at once; what they found is put together in their order when the last one
is done, so that neither threads nor their order change a bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from allfuse.base.errors import MergeError
from allfuse.merge.blocks import Files
from allfuse.merge.header import Entry
from allfuse.merge.outline import Task
from allfuse.merge.recipe import Recipe
from allfuse.rule import SumRule
from allfuse.rule.base import GatherRule, JointRule
from allfuse.rule.sift import Sift, Stretch
from allfuse.store.tensorfile import DTYPES

SLICE = 1 << 15
MOST = torch.finfo(torch.float32).max


class Found:
    """What the turns of a sift found out of one model's tensor, or those of a rule out of all.

    Whole numbers are summed as they come, in any order; others when all blocks are there.

    Attributes:
        totals: the sum over all blocks, by turn.
        before: of turns that run, the sums over earlier blocks, a row for each block.
    """

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.before: dict[int, Tensor] = {}
        self._sum: Tensor | None = None
        self._parts: dict[int, Any] = {}

    def take(self, block: int, part: Tensor, running: bool) -> None:
        """What the present turn found out of a block."""
        if running or part.is_floating_point():
            # as plain numbers: small tensors that stay would keep the memory around them in pieces
            self._parts[block], self._dtype = part.tolist(), part.dtype
        else:
            self._sum = part if self._sum is None else self._sum.add_(part)

    def close_turn(self) -> None:
        """All blocks are there."""
        if self._sum is not None:
            self.totals.append(self._sum)
        else:
            parts = [self._parts[block] for block in range(len(self._parts))]
            sums = torch.tensor(parts, dtype=self._dtype).cumsum(0)  # one after the other
            self.before[len(self.totals)] = torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])
            self.totals.append(sums[-1])
        self._sum, self._parts = None, {}

    def at(self, block: int, running: frozenset[int]) -> list[Tensor]:
        """What is known at a block."""
        return [
            self.before[turn][block] if turn in running else total
            for turn, total in enumerate(self.totals)
        ]


class Course:
    """One tensor on its way through the stages.

    Args:
        sources, target: the files it is read from, and written to.
    """

    def __init__(self, task: Task, recipe: Recipe, sources: Files, target: Files) -> None:
        self.task, self.recipe = task, recipe
        self.sources, self.target = sources, target
        self.blocks = task.blocks()
        self.stage = 0
        self.rule = task.rule
        self.is_copied = not task.target.is_float
        self.sifts: list[Sift | None] = [
            None if self.is_copied else rule.sift(task.target.count) for rule in task.rules
        ]
        turns = max(sift.turns if sift else 0 for sift in self.sifts)
        self.joint = self.rule if isinstance(self.rule, JointRule) and not self.is_copied else None
        joint = self.joint.turns(task.target.count) if self.joint else 0
        self.stages = [*["turn"] * turns, *["joint"] * joint, "write"]
        self._found, self._of_all = [Found() for _ in task.inputs], Found()

    @property
    def is_last(self) -> bool:
        return self.stages[self.stage] == "write"

    @torch.no_grad()
    def do(self, block: int) -> Any:
        """Do one block of the present stage; what it found. Of the last one the crc."""
        name = self.stages[self.stage]
        if name == "write":
            return self._write(block)
        base = self._base(block)
        if name == "joint":
            assert self.joint is not None
            turn = len(self._of_all.totals)
            return self.joint.measure(turn, self._together(block, base), self._known(block))
        return [self._measured(model, block, base) for model in range(len(self.task.inputs))]

    def take(self, block: int, result: Any) -> None:
        """What a block of the present stage gave; one at a time."""
        if self.stages[self.stage] == "joint":
            assert self.joint is not None
            self._of_all.take(block, result, len(self._of_all.totals) in self.joint.running)
        elif not self.is_last:
            for sift, found, part in zip(self.sifts, self._found, result, strict=True):
                if sift is not None and part is not None:
                    found.take(block, part, len(found.totals) in sift.running)

    def close_stage(self) -> None:
        """All blocks of a stage are done: put together what they found, in their order."""
        if self.stages[self.stage] == "joint":
            self._of_all.close_turn()
        elif not self.is_last:
            for sift, found in zip(self.sifts, self._found, strict=True):
                if sift is not None and self.stage < sift.turns:
                    found.close_turn()
        self.stage += 1

    def _measured(self, model: int, block: int, base: Tensor | None) -> Tensor | None:
        """What the present turn finds out of a block of one model; None: it has no such turn."""
        sift = self.sifts[model]
        if sift is None or self.stage >= sift.turns:
            return None
        known = self._found[model].at(block, sift.running)
        return sift.measure(self.stage, self._stretch(model, block, base), known)

    def _read(self, entry: Entry, block: int) -> Tensor:
        """A block in float32, in memory of its own."""
        return self.sources.read(entry, *self.blocks[block]).float()

    def _base(self, block: int) -> Tensor | None:
        return None if self.task.base is None else self._read(self.task.base, block)

    def _stretch(self, model: int, block: int, base: Tensor | None) -> Stretch:
        """A block of one model: its values, or what changed since the base."""
        values, target = self._read(self.task.inputs[model], block), self.task.target
        if base is not None:
            values -= base
        key = self.recipe.key(target.name, model)
        return Stretch(values, self.blocks[block][0], target.shape, key)

    def _sifted(self, model: int, block: int, base: Tensor | None) -> Tensor:
        """What is left of a block of one model."""
        stretch, sift = self._stretch(model, block, base), self.sifts[model]
        if sift is None:
            return stretch.values
        if self.is_last:
            self._refuse_read(stretch.values, block)  # before it may be left out
        return sift.apply(stretch, self._found[model].at(block, sift.running))

    def _together(self, block: int, base: Tensor | None) -> Stretch:
        """A block of all models."""
        begin, count = self.blocks[block]
        values = torch.empty(len(self.task.inputs), count)
        for model, row in enumerate(values):
            row.copy_(self._sifted(model, block, base))
        return Stretch(values, begin, self.task.target.shape)

    def _known(self, block: int) -> list[Tensor]:
        assert self.joint is not None
        return self._of_all.at(block, self.joint.running)

    def _refuse_read(self, values: Tensor, block: int) -> None:
        """Raises MergeError where values are not finite because a number in a file is not."""
        if self.recipe.allow_nan or _fits(values, MOST):
            return
        for entry in self.task.sources:
            read = self.sources.read(entry, *self.blocks[block])
            at = _first_beyond(read.float(), MOST)
            if at is not None:
                value = read[at].item()
                beyond = ", which float32 cannot hold" if math.isfinite(value) else ""
                raise MergeError(
                    f"{entry.file}: {entry.name} has {value} at index "
                    f"{self.blocks[block][0] + at:,}{beyond}; next: take another checkpoint, or "
                    "--allow-nan"
                )

    def _refuse_written(self, fused: Tensor, block: int) -> None:
        """Raises MergeError where what is fused is not finite, or not in the type it is written in;
        says whether that comes from what was read, from the rule, or from the type."""
        target = self.task.target
        most = _most(DTYPES[target.dtype])
        if self.recipe.allow_nan or _fits(fused, most):
            return
        self._refuse_read(fused, block)
        at = _first_beyond(fused, most)
        assert at is not None
        value = fused[at].item()
        what = f"{target.name} would have {value:g} at index {self.blocks[block][0] + at:,}"
        if math.isfinite(value):
            wider = "F32" if target.dtype == "BF16" else "BF16 or F32"
            raise MergeError(
                f"{what}, which {target.dtype} cannot hold; next: --dtype {wider}, or --allow-nan"
            )
        weights = ", ".join(f"{weight:g}" for weight in self.task.weights)
        raise MergeError(
            f"{what}, and all that was read is finite: {self.rule} with weights {weights} goes "
            "beyond what float32 holds; next: smaller weights or arguments, or --allow-nan"
        )

    def _write(self, block: int) -> int:
        target, (begin, count) = self.task.target, self.blocks[block]
        if self.is_copied:
            return self.target.write(
                target, begin, self.sources.read(self.task.inputs[0], begin, count)
            )
        base = self._base(block)
        fused = self._fuse(block, base)
        if base is not None:
            fused += base
        self._refuse_written(fused, block)
        return self.target.write(target, begin, fused.to(DTYPES[target.dtype]))

    def _fuse(self, block: int, base: Tensor | None) -> Tensor:
        rule, weights = self.rule, self.task.weights
        if isinstance(rule, SumRule):
            total = rule.prepare(self._sifted(0, block, base), weights[0])
            for model in range(1, len(weights)):
                total += rule.prepare(self._sifted(model, block, base), weights[model])
            return rule.finish(total, sum(weights))
        stretch, shares = self._together(block, base), torch.tensor(weights, dtype=torch.float64)
        if not any(self.sifts):
            self._refuse_read(stretch.values, block)  # a rule may leave it out
        if isinstance(rule, JointRule):
            return rule.fuse(stretch, shares, self._known(block))
        assert isinstance(rule, GatherRule)
        return _gather(rule, stretch.values, shares.float())


def _most(dtype: torch.dtype) -> float:
    """Up to which size a type holds the numbers of float32: those that round to its largest."""
    about = torch.finfo(dtype)
    return min(about.max * (1 + about.eps / 4), MOST)


def _fits(values: Tensor, most: float) -> bool:
    """Whether all values are at most so large; none is NaN then."""
    flat = values.view(-1)
    if torch.dot(flat, flat).sqrt().item() <= most:  # none is larger, and it takes a sixth
        return True
    return all(abs(end.item()) <= most for end in flat.aminmax())


def _first_beyond(values: Tensor, most: float) -> int | None:
    bad = (~(values.abs() <= most)).nonzero()
    return int(bad[0]) if len(bad) else None


def _gather(rule: GatherRule, values: Tensor, weights: Tensor) -> Tensor:
    """The fused numbers, some at a time: what a rule holds meanwhile stays in the cache."""
    parts = [rule.fuse(part, weights) for part in values.split(SLICE, dim=1)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
