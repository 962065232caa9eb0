"""One step of training on one rank: losses in, fused gradients of the whole batch out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from allfuse.base.errors import DataError, UserError
from allfuse.base.tensors import count_rows, cut_rows, share
from allfuse.fusion.statistics import GlobalBatchNorm
from allfuse.split.data import Portion
from allfuse.training.exchange import Exchange, Figures
from allfuse.training.learner import Learner
from allfuse.training.measure import sum_and_count
from allfuse.training.place import Place
from allfuse.training.wishes import Wishes

if TYPE_CHECKING:
    from allfuse.split.base import Split
    from allfuse.split.pipe.pipeline import Pipeline
    from allfuse.training.outflow import Outflow

from allfuse.training.blame import Blame
from allfuse.training.step import Step

NORM_EVERY_S = 0.25  # of work: how often the gradient's norm is taken only to be shown


class Stepper:
    """Weighs the losses of a rank, so that the sum over ranks is the gradient of the whole batch.

    Each rank differentiates (sum of its losses) / reference, where the reference is the number of
    samples of the whole batch, known beforehand. If the losses are means over something else
    (tokens), the fused gradients are corrected by reference / (true total count), which the
    exchange has told by then; for means over samples that factor is exactly 1 and nothing is done.

    Args:
        clip: largest norm of the gradient, or None.
        accumulate: parts into which the rank's samples are cut.
        how_to_go_on: words for an error on what is safe on disk, told whether weights diverged.
    """

    def __init__(
        self,
        place: Place,
        wishes: Wishes,
        split: Split,
        *,
        clip: float | None,
        accumulate: int,
        how_to_go_on: Callable[[bool], str],
    ) -> None:
        self.place, self.wishes, self.clip, self.accumulate = place, wishes, clip, accumulate
        self.group: list[int] = []
        self.meet_peers()
        self.norms: list[GlobalBatchNorm] = []
        self.always_norm = False
        self.split = split
        self.outflow: Outflow | None = None
        self.current: Step | None = None
        self.blame = Blame(place, how_to_go_on)
        self.before_forward: Callable[[int, int], None] = lambda stage, microbatch: None
        self._busy_s = 0.0
        self._since_norm_s = math.inf

    def open(self, portion: Portion | None) -> None:
        """Begin a step; without a portion on a batch of the script's own."""
        for norm in self.norms:
            norm.weight_of_rows = 1.0 if portion is None or portion.rows else 0.0
            norm.waited_s = 0.0
        self.current = Step(portion, self.group, self.place.sharers.size)

    def meet_peers(self) -> None:
        """Take the places of the peers in the plan, and the link to them, as they are now."""
        place = self.place
        self.group = [place.plan.replica_index(member) for member in place.sharers.members]
        self._take_link()

    def _take_link(self) -> None:
        place = self.place
        self.exchange = Exchange(place.sharers, place.device)
        columns = [
            place.plan.coordinates(member).get("data", 0) for member in place.sharers.members
        ]
        self._columns = [
            [at for at, column in enumerate(columns) if column == peer]
            for peer in sorted(set(columns))
        ]

    def keep_peers(self, places: Sequence[int]) -> None:
        """Go on with some of the peers, which keep their shares until batches are cut anew."""
        self.group = [self.group[place] for place in places]
        self._take_link()
        self._since_norm_s = math.inf  # as on others, who may have taken it in a step undone here
        if self.current is not None:
            self.current.keep_peers(places)

    def hear_of(self, learner: Learner, figures: Figures | None) -> None:
        """Another rank has told what this step came to, which this one has missed."""
        step = self.current
        assert step is not None
        step.figures, step.pending, step.losses, step.count = figures, None, [], 0.0
        step.passed = figures is None
        self.after_step_of(learner)

    def passes(self, learner: Learner) -> bool:
        """Whether this site has no sample of the batch: then the step is done without learning."""
        step = self.current
        assert step is not None
        if step.idle:
            step.passed = True
            learner.clear_spent()
        return step.idle

    def learn(self, learner: Learner, batch: Any, compute: Callable[[Any], Any]) -> Figures | None:
        """Differentiate `compute(batch)`, in pieces where asked for; None when idle."""
        step = self.current
        assert step is not None
        if self.passes(learner):
            return None
        pieces = self._pieces(step, batch)
        if self.split.pipeline is not None:
            return self._learn_in_stages(self.split.pipeline, step, learner, pieces, compute)
        for number, (piece, rows) in enumerate(pieces, start=1):
            value = compute(piece)
            loss, factor, count = sum_and_count(value, rows, "the loss")
            is_last = number == len(pieces)
            scale = self._scale(step, step.count + count, isinstance(value, Tensor))
            if is_last and scale is not None and self.outflow is not None:
                self.outflow.open(scale)
            self.differentiate(learner, loss, factor, count, last=is_last)
        if self.outflow is not None:
            self.outflow.close()
        return self.finish(learner)

    def _scale(self, step: Step, count: float, is_of_samples: bool) -> float | None:
        """What corrects the gradients of a step, where that is known before they are: for a mean
        over samples, or where this rank alone has all that the mean is over."""
        if self.place.sharers.size > 1:
            return 1.0 if is_of_samples else None
        return step.reference / count if count > 0 else None

    def _learn_in_stages(
        self,
        pipeline: Pipeline,
        step: Step,
        learner: Learner,
        pieces: list[tuple[Any, int]],
        compute: Callable[[Any], Any],
    ) -> Figures:
        """The same where the model is cut between its layers: each piece goes through the stages in
        microbatches. The last stage tells the others what the losses came to."""
        losses: list[tuple[Tensor, float]] = []
        told = [0.0, 0.0]
        begin_s = pipeline.waited_s

        def lose(value: Any, rows: int) -> Tensor:
            loss, factor, count = sum_and_count(value, rows, "the loss")
            if not step.takes_part:
                factor = count = 0.0
            losses.append((loss.detach(), factor))
            told[1] += count
            return loss * (factor / step.reference)

        def work(inputs: Sequence[Parameter] | None) -> None:
            first, fewest = 0, self._fewest_rows(step, pieces)
            for number, (piece, rows) in enumerate(pieces, start=1):
                parts, is_last = pipeline.cut(piece, rows, fewest), number == len(pieces)
                pipeline.learn(parts, compute, lose, self._before(first), inputs, is_last)
                first += len(parts)

        learner.refresh()
        if learner not in step.differentiated:
            step.differentiated.append(learner)
        learner.collect(work)
        pipeline.gather(learner.named())
        told[0] = sum([float(loss) * factor for loss, factor in losses])
        total, count = pipeline.tell(told)
        step.losses.append((torch.tensor(total, dtype=torch.float64), 1.0))
        step.count += count
        step.waited_s += pipeline.waited_s - begin_s
        self._tell_peers(step, learner)
        return self.finish(learner)

    def _fewest_rows(self, step: Step, pieces: Sequence[tuple[Any, int]]) -> int | None:
        """The fewest rows of a piece on the ranks that meet this one within each microbatch, since
        they have other rows of its stages; None where there are none."""
        if self.place.shard.size == 1:
            return None
        if step.portion is None:
            (fewest,) = self.split.strongest([-min(rows for _, rows in pieces)])
            return -int(fewest)
        shares = [step.portion.shares[index] for index in step.group]
        return min(size for size in shares if size > 0) // len(pieces)

    def _before(self, first: int) -> Callable[[int, int], None]:
        """What is done before a forward pass, where so many microbatches went before."""
        return lambda stage, microbatch: self.before_forward(stage, first + microbatch)

    def _pieces(self, step: Step, batch: Any) -> list[tuple[Any, int]]:
        """The batch in the pieces that it is accumulated over, and the rows of each.

        Where ranks meet in each piece, for batch statistics or since they share a model, all cut as
        many, none without a row; a stand-in then is used for every piece.
        """
        rows = self._rows(step, batch)
        if self.accumulate == 1:
            return [(batch, rows)]
        count = min(self.accumulate, rows)
        meets = self.norms or self.place.shard.size > 1
        if meets and step.portion is not None:
            shares = [step.portion.shares[index] for index in step.group]
            count = min(self.accumulate, *(size for size in shares if size > 0))
        if count == 1 or not step.takes_part:
            return [(batch, rows)] * count
        bounds = [share(rows, count, number) for number in range(count)]
        return [(cut_rows(batch, start, stop), stop - start) for start, stop in bounds]

    def _rows(self, step: Step, batch: Any) -> int:
        try:
            return count_rows(batch)
        except ValueError as error:
            if step.portion is not None and self.accumulate == 1:  # nothing is to be cut
                return max(step.portion.rows, 1)
            raise DataError(f"the samples of a batch cannot be counted: {error}") from None

    def differentiate(
        self, learner: Learner, loss: Tensor, factor: float, count: float, *, last: bool
    ) -> None:
        """Add the gradients of `loss * factor`, which is a sum over `count` things.

        With `last` the peers are told the loss, the count and this rank's wish to stop.
        """
        step = self.current
        assert step is not None
        if not step.takes_part:
            factor = count = 0.0
        step.losses.append((loss.detach(), factor))
        step.count += count
        if learner not in step.differentiated:
            step.differentiated.append(learner)
        learner.refresh()
        if last:
            self._tell_peers(step, learner)
        weight = factor / step.reference
        learner.backward(loss if weight == 1.0 else loss * weight, last)

    def _tell_peers(self, step: Step, learner: Learner) -> None:
        self._weigh(step, learner)
        step.pending = self.exchange.start(
            step.losses, step.count, self._busy_s, self.wishes.own, learner.fusion
        )

    def _weigh(self, step: Step, learner: Learner) -> None:
        """Say how much each replica of the data axis counts; its shards have parts of its share."""
        weights, count = step.weights, step.count
        replicas = [sum([weights[at] for at in column]) for column in self._columns]
        if self.place.shard.size > 1 and not learner.fusion.is_mean:
            total = torch.tensor([count], dtype=torch.float64, device=self.place.device)
            self.place.shard.all_reduce(total, "count what a replica's mean is over").wait()
            count = float(total)
        learner.fusion.weigh(step.reference, count, replicas)

    def finish(self, learner: Learner) -> Figures:
        """Wait for exchange and fusions, correct, clip. Afterwards the optimizer may step.

        Raises:
            NonFiniteLoss: a rank's loss, or the norm, is NaN or infinite: on all ranks alike.
        """
        step = self.current
        assert step is not None
        assert step.pending is not None
        begin = time.perf_counter()
        met_s = sum([norm.waited_s for norm in self.norms])  # those of other models included
        step.busy_s = begin - step.begin - step.waited_s - met_s
        figures = self._agreed(step.pending())
        bad, total = figures.first_not_finite(), figures.total
        if bad is not None:
            raise self.blame.refusal(learner, "the loss", figures.losses[bad], self.blame.rank(bad))
        if total == 0 and self.place.whole.outer is not None:  # others have samples that count
            learner.forget()
            step.figures, step.pending, step.losses = figures, None, []
            return figures
        if not 0 < total < math.inf:
            what = "the count that the loss is a mean over"
            raise self.blame.refusal(learner, what, total, self.blame.group)
        learner.finish(step.reference / total if learner.fusion.is_mean else 1.0)
        step.figures, step.pending, step.losses, step.count = figures, None, [], 0.0
        step.waited_s += time.perf_counter() - begin
        self._since_norm_s += max(figures.busy_s)  # not a rank's own clock: all must agree
        if self.clip is not None or self.always_norm or self._since_norm_s > NORM_EVERY_S:
            norm = learner.clip(self.clip)
            step.norm, self._since_norm_s = None if norm is None else float(norm), 0.0
            if step.norm is not None and not math.isfinite(step.norm) and not learner.may_skip:
                what = "the norm of the gradient"
                raise self.blame.refusal(learner, what, step.norm, self.blame.group)
        learner.note_gradients()
        return figures

    def _agreed(self, figures: Figures) -> Figures:
        """With what steers all ranks of a replica alike: its strongest wish, its longest work."""
        if self.split.cuts:
            wish, busy_s = self.split.strongest([max(figures.stops), max(figures.busy_s)])
            figures.stops = [int(wish)] * len(figures.stops)
            figures.busy_s = [busy_s] * len(figures.busy_s)
        return figures

    def before_step_of(self, learner: Learner) -> None:
        """Called when an optimizer is about to step. Refuses gradients that are not ready."""
        learner.check_gradients()
        if self.current is not None and learner in self.current.left_open:
            raise UserError(
                "s.due, s.save or s.evaluate was called between backward and optimizer.step(); "
                "next: call it after the optimizer's step"
            )

    def after_step_of(self, learner: Learner) -> None:
        """Called when an optimizer has stepped."""
        learner.stepped()
        if self.current is not None and learner not in self.current.stepped:
            self.current.stepped.append(learner)

    def count(self) -> Step | None:
        """The open step, which counts as done from now on; None when none is open."""
        step = self.current
        if step is None or step.counted:
            return None
        step.counted = True
        step.left_open = [each for each in step.differentiated if each not in step.stepped]
        self._busy_s = step.busy_s
        return step
