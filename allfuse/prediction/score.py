"""Scoring a file of rows with a trained run, by all ranks, into a file in the same order."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from allfuse.base.errors import DataError, Interrupted, UserError
from allfuse.plan import Plan
from allfuse.prediction.agreement import Agreement, State, Status
from allfuse.prediction.answers import BadOutput, Columns, format_rows
from allfuse.prediction.header import HEADER_ROW
from allfuse.prediction.output import OutputFile
from allfuse.prediction.progress import OnEvent, Progress
from allfuse.prediction.restore import open_run
from allfuse.prediction.scorer import Scorer, one_thread, require_inputs
from allfuse.prediction.table import BadRow, Table, require_csv
from allfuse.training.parting import make_split
from allfuse.training.place import Place

LEAST_BATCH = 256
TURN_S = 0.25  # turns grow until they take this long, so that agreeing costs little beside them
TURN_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was predicted: rows, the seconds that scoring took, rows by rank, where the output is,
    and notes on what whoever asked should know."""

    rows: int
    seconds: float
    rows_per_s: float
    shares: list[int]
    output: str
    notes: list[str] = field(default_factory=list)


def predict_file(
    run_path: str | Path,
    input_path: str | Path,
    output_path: str | Path,
    *,
    plan: Plan | str | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    keep: Sequence[str] = (),
    weights: str = "last",
    overwrite: bool = False,
    on_event: OnEvent | None = None,
) -> Summary:
    """Score every row of a CSV file, in the ranks that are here already; each rank calls it.

    The output has one row for each of the input, in its order: the columns of `answers.answer`,
    then the kept ones. It is the same byte for byte for any number of workers: rows are cut into
    batches of `batch_size` first, whole batches go to workers, and on CPUs each worker computes
    with one thread, for the last bits depend on both. It appears under its name when it is
    complete, and not at all after an error. Where ranks share a model, the last digits depend on
    how it is cut.

    Args:
        batch_size: rows of one forward pass; by default the job's, at least 256.
        keep: columns of the input that the output repeats.
        weights: the "last" ones, those of the "best" checkpoint, or the "average".
        overwrite: replace an existing output file, instead of refusing it.
        on_event: `on_event("scored", rows, total_rows, rows_per_s, seconds_left, shares)`, called
            on rank 0 at most twice a second and at the end.

    Raises:
        DataError: the input or the output cannot be used; every rank names the same bad row, the
            first one.
        RunError, JobError, CheckpointError: as `open_run`; JobError where the job does not say how
            to predict from columns.
        PeerLost: another rank failed. Interrupted: Ctrl-C.
    """
    source, target = Path(input_path), Path(output_path)
    require_csv(source, "input")
    require_csv(target, "output")
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"--output {target} is the input; allowed: another file")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: allowed: a whole number from 1")
    try:
        with contextlib.ExitStack() as stack:
            place = Place(plan, device)
            stack.callback(place.close)
            agreement = Agreement(place.everyone, place.device)
            split = make_split(place)

            def open_all() -> Scoring:
                output = OutputFile(target, overwrite=overwrite) if place.rank == 0 else None
                if output is not None:
                    stack.callback(output.close)
                restored = open_run(run_path, weights=weights, later=True)
                table = Table(source, require_inputs(restored.job), keep)
                stack.callback(table.close)
                return Scoring(
                    place=place,
                    agreement=agreement,
                    scorer=Scorer(restored, place.device),
                    answers=split.answers and place.shard.rank == 0,
                    table=table,
                    output=output,
                    target=target,
                    batch_size=batch_size or max(restored.job.batch_size or 0, LEAST_BATCH),
                    keep=list(keep),
                    notes=restored.notes,
                    progress=Progress(_replicas(place), on_event if place.rank == 0 else None),
                )

            _, scoring = agreement.together(lambda: (Status(), open_all()))
            scoring.scorer.cut(split)
            stack.enter_context(one_thread(place.device))
            return scoring.run()
    except KeyboardInterrupt:
        raise Interrupted(f"the prediction was interrupted; {target} was not written") from None


@dataclass(kw_only=True)
class Scoring:
    """One rank's part of scoring a file, in turns.

    Phases of a turn, in which each rank does its own part:

    1. rank 0 writes the texts of the turn before; all walk over the rows of this turn, read and
       score those of their batches, and format what the model says of them;
    2. all exchange their statuses (48 bytes for each rank), and stop together where they must;
    3. the others send their texts to rank 0.
    """

    place: Place
    agreement: Agreement
    scorer: Scorer
    answers: bool
    table: Table
    output: OutputFile | None
    target: Path
    batch_size: int
    keep: list[str]
    notes: list[str]
    progress: Progress
    records: list[bytes] = field(default_factory=list)
    first_row: int = HEADER_ROW + 1
    ahead: int = 1

    def run(self) -> Summary:
        """Score until the file ends, then give the output its name."""
        self.progress.begin()
        texts: list[bytes] = []
        while True:
            statuses, text = self.agreement.together(functools.partial(self._turn, texts))
            self._judge(statuses)
            if not self.records:
                break
            texts = self.agreement.gather(text, [status.length for status in statuses])
            self.first_row += len(self.records)
            self.ahead = statuses[0].ahead
            self.progress.add(self._scored(statuses), self.table.part_read)
        self.agreement.together(self._finish)
        progress, seconds = self.progress, self.progress.seconds
        progress.end()
        return Summary(
            rows=progress.rows,
            seconds=seconds,
            rows_per_s=progress.rows / max(seconds, 1e-9),
            shares=progress.shares,
            output=str(self.target),
            notes=self.notes,
        )

    def _turn(self, texts: list[bytes]) -> tuple[Status, bytes]:
        """Write what came of the last turn, and score this rank's part of the next rows."""
        begin = time.monotonic()
        if self.output is not None:
            for text in texts:
                self.output.write(text)
        size, parts = self.batch_size, _replicas(self.place)
        self.records = self.table.take(self.ahead * parts * size)
        taken, pieces, scored = len(self.records), [], 0
        try:
            replica = self.place.rank // self.place.plan.replica_size
            for start in batch_starts(taken, size, parts, replica):
                records = self.records[start : start + size]
                pieces.append(self._score(records, self.first_row + start))
                scored += len(records)
        except BadRow as error:
            return Status(state=State.BAD_ROW, row=error.row, taken=taken), b""
        done = b"".join(pieces)
        if not self.answers:  # another rank of the replica has the same
            done, scored = b"", 0
        ahead = self._next_ahead(time.monotonic() - begin)
        return Status(taken=taken, scored=scored, length=len(done), ahead=ahead), done

    def _score(self, records: list[bytes], first_row: int) -> bytes:
        """The lines of output for one batch.

        Raises:
            BadRow: a row that cannot be read, or that the model gives NaN for.
        """
        numbers, kept = self.table.parse(records, first_row)
        try:
            columns = self.scorer.answer(numbers, first_row)
        except BadOutput as error:
            raise self._bad_output(first_row + error.index) from None
        if columns is None:  # the last stage of the model has them
            return b""
        rows = format_rows([*columns.values(), *zip(*kept, strict=True)])
        return self._header(columns) + rows if first_row == HEADER_ROW + 1 else rows

    def _header(self, columns: Columns) -> bytes:
        """The first line, which comes with the first batch."""
        both = [name for name in self.keep if name in columns]
        if both:
            raise DataError(
                f"--keep {both[0]}: the output has a column of that name already; next: rename the "
                f"column in {self.table.path}"
            )
        return format_rows([[name] for name in (*columns, *self.keep)])

    def _next_ahead(self, seconds: float) -> int:
        """Batches for each rank in the next turn. Nothing in the output depends on it."""
        row_bytes = max(1.0, sum(map(len, self.records)) / max(len(self.records), 1))
        fits = TURN_BYTES / row_bytes / self.batch_size / _replicas(self.place)
        return max(1, min(self.ahead * 2 if seconds < TURN_S else self.ahead, int(fits)))

    def _scored(self, statuses: list[Status]) -> list[int]:
        """Rows that each replica has scored in a turn."""
        found = [0] * _replicas(self.place)
        for rank, status in enumerate(statuses):
            found[rank // self.place.plan.replica_size] += status.scored
        return found

    def _judge(self, statuses: list[Status]) -> None:
        """Stop on all ranks, with the same error, where one of them must.

        Raises:
            DataError: the lowest of the bad rows, or the ranks see different files.
        """
        if any(status.taken != len(self.records) for status in statuses):
            raise DataError(
                f"{self.table.path}: the ranks read different rows; allowed: the same file on all "
                "hosts, which nobody changes meanwhile"
            )
        bad = [status.row for status in statuses if status.state is State.BAD_ROW]
        if bad:
            row = min(bad)
            record = self.records[row - self.first_row]
            self.table.parse([record], row)  # raises what the rank that has it found, if it is that
            raise self._bad_output(row)

    def _bad_output(self, row: int) -> BadRow:
        return BadRow(
            f"{self.table.path} row {row}: the model gives NaN or infinity for it; next: compare "
            "its values with those that the model was trained on",
            row,
        )

    def _finish(self) -> tuple[Status, None]:
        if not self.progress.rows:
            raise DataError(f"{self.table.path} has a header and no rows; allowed: rows below it")
        if self.output is not None:
            self.output.commit()
        return Status(), None


def batch_starts(rows: int, size: int, parts: int, index: int) -> range:
    """Where the batches of one part begin, when rows are cut into batches and these into runs.

    The first parts have a batch more where they do not divide evenly.

    >>> [list(batch_starts(1000, 300, 3, index)) for index in range(3)]
    [[0, 300], [600], [900]]
    """
    batches = -(-rows // size)
    start, stop = (-(-batches * part // parts) for part in (index, index + 1))
    return range(start * size, stop * size, size)


def _replicas(place: Place) -> int:
    """Who scores batches of its own: the ranks of a model that is cut all work on the same."""
    return place.plan.workers // place.plan.replica_size
