"""What a search asks about candidates, and keeps of the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from allfuse.judge.candidate import Candidate, single, together
from allfuse.judge.data import VALIDATION
from allfuse.judge.jury import Jury, Question
from allfuse.judge.measured import Measured
from allfuse.judge.scores import Scores
from allfuse.judge.subject import Subject

Tell = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a candidate is on the validation data. value: higher is better; of a figure that is
    no number, -inf. loss: decides between equal values, where a search needs that."""

    value: float
    loss: float
    figure: float

    @property
    def order(self) -> tuple[float, float]:
        """Higher is better."""
        return self.value, -self.loss if math.isfinite(self.loss) else -math.inf


class Bench:
    """Where candidates are judged, each once.

    Args:
        key: of the file in which the answer to a question is kept.
        limit: candidates that may be judged in all, on validation data; None: any number. Those
            that are known from before count, too, so that a search finds the same again.
        tell: hears of each candidate: `tell("judged", ...)`.

    Attributes:
        scores: of all candidates so far, in the order in which they were asked for.
        known: the questions that an earlier search has answered.
        measured: how many were answered by measuring.
    """

    def __init__(
        self, subject: Subject, jury: Jury, kept: Scores, key: Callable[[Question], str],
        limit: int | None, tell: Tell,
    ) -> None:  # fmt: skip
        self.subject, self.jury, self.limit = subject, jury, limit
        self.scores: dict[Candidate, Score] = {}
        self._answers: dict[Question, Measured] = {}
        self.known: set[Question] = set()
        self.measured = 0
        self._kept, self._key, self._tell = kept, key, tell

    @property
    def count(self) -> int:
        """How many models there are."""
        return len(self.subject.models)

    @property
    def workers(self) -> int:
        """How many candidates are judged at once."""
        return self.jury.size

    @property
    def left(self) -> float:
        """How many more candidates may be judged."""
        return math.inf if self.limit is None else self.limit - len(self.scores)

    def ask(self, candidates: Sequence[Candidate]) -> list[Score]:
        """The scores of candidates, in their order: of the first ones only, where no more may be
        judged."""
        new = list(dict.fromkeys(each for each in candidates if each not in self.scores))
        new = new[: int(min(self.left, len(new)))]
        for place in range(0, len(new), self.workers):
            some = new[place : place + self.workers]
            found = self.measure([(candidate, VALIDATION) for candidate in some])
            for candidate, each in zip(some, found, strict=True):
                self._note(candidate, each)
        scores = []
        for candidate in candidates:
            if candidate not in self.scores:
                break
            scores.append(self.scores[candidate])
        return scores

    def measure(self, questions: Sequence[Question]) -> list[Measured]:
        """The answers to questions: known from before, or measured now."""
        open_ones = []
        for question in dict.fromkeys(questions):
            if question in self._answers:
                continue
            found = self._kept.find(self._key(question))
            if found is None:
                open_ones.append(question)
            else:
                self._answers[question] = found
                self.known.add(question)
        answers = self.jury.judge(open_ones) if open_ones else []
        for question, answer in zip(open_ones, answers, strict=True):
            candidate, name = question
            self._kept.add(self._key(question), {**candidate.plain(), "data": name}, answer)
            self._answers[question] = answer
            self.measured += 1
        return [self._answers[question] for question in questions]

    def best(self) -> Candidate:
        """The best so far; of equal ones the one that was judged first."""
        return max(self.scores, key=lambda candidate: self.scores[candidate].order)

    def best_single(self) -> Candidate:
        """The best of the models as they are; of equal ones the first."""
        return max((single(n) for n in range(self.count)), key=lambda c: self.scores[c].value)

    def uniform(self) -> Candidate | None:
        """All models with the same weight by the search's rule, where it takes so many."""
        rule = self.subject.rule
        return together(range(self.count), rule) if rule.models in (None, self.count) else None

    def _note(self, candidate: Candidate, measured: Measured) -> None:
        job = self.jury.examiner.job
        figure = measured.figures[job.monitor_name]
        value = job.score(measured.figures)
        loss = measured.figures.get("loss", math.nan)
        value = -math.inf if math.isnan(value) else value
        self.scores[candidate] = Score(value=value, loss=loss, figure=figure)
        self._tell(
            "judged",
            number=len(self.scores),
            candidate=self.subject.describe(candidate),
            metric=job.monitor_name,
            figure=figure,
            known=(candidate, VALIDATION) in self.known,
            best=self.scores[self.best()].figure,
        )
