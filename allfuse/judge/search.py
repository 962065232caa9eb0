"""Looks for the fusion of some models that is best on the validation data of their job."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from shlex import join
from typing import Any

from allfuse.base.errors import Interrupted, MergeError
from allfuse.judge.bench import Bench, Tell
from allfuse.judge.candidate import Candidate, single
from allfuse.judge.coefficients import coefficients
from allfuse.judge.data import fingerprint, read_data
from allfuse.judge.examiner import Examiner
from allfuse.judge.greedy import greedy
from allfuse.judge.jury import Jury, Question
from allfuse.judge.methods import legal_rules, methods
from allfuse.judge.report import CHOSEN, NAME, finite, make_report
from allfuse.judge.scores import NAME as SCORES
from allfuse.judge.scores import Scores
from allfuse.judge.scratch import scratch
from allfuse.judge.subject import Subject
from allfuse.judge.wish import EVALUATIONS, Wish, check
from allfuse.merge.folder import held, put_in_place
from allfuse.merge.outline import outline
from allfuse.plan import Plan
from allfuse.store.durable import PARTIAL, explain, replace_bytes
from allfuse.store.run import RunFolder, versions
from allfuse.training.place import Place


def search(
    subject: Subject,
    wish: Wish,
    *,
    plan: Plan | str | None = None,
    device: str | None = None,
    tell: Tell = lambda name, **data: None,
) -> dict[str, Any] | None:
    """Search in the ranks that are here already, each of which judges some of the candidates; the
    report on rank 0, else None. Every rank of the plan calls it.

    The result is a run folder: the model, the job that it can be measured by, and the report. What
    was measured is kept beside it, in a folder of that name, for the next search.

    Args:
        tell: hears on rank 0 of what happens: "searching", "judged".

    Raises:
        MergeError, JobError, UserError: what is refused, and what cannot be read or written.
        PeerLost: another rank failed. Interrupted: Ctrl-C.
    """
    check(subject, wish)
    try:
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(contextlib.closing(Place(plan, device)))
            job = subject.job.load()
            data, note = read_data(job)
            size = outline(subject.recipe(single(0))).written_bytes * place.plan.workers
            with _told(wish.out):
                folder = stack.enter_context(scratch(size, wish.out.resolve().parent))
            examiner = Examiner(subject, job, data, place.device, folder)
            jury = Jury(examiner, place.everyone, place.device)
            if place.rank != 0:
                jury.serve()
                return None
            stage = wish.out.with_name(f"{PARTIAL}search-{wish.out.name}")
            with _told(wish.out):
                stack.enter_context(held(stage))
            stack.callback(shutil.rmtree, stage, ignore_errors=True)
            return _lead(subject, wish, jury, [] if note is None else [note], tell, stage)
    except KeyboardInterrupt:
        raise Interrupted(
            "the search was interrupted; the same command goes on with what was measured"
        ) from None


@contextlib.contextmanager
def _told(out: Path) -> Iterator[None]:
    """Say in one line why something cannot be written. Raises MergeError."""
    try:
        yield
    except OSError as error:
        raise MergeError(explain(error, out)) from error


def _lead(
    subject: Subject, wish: Wish, jury: Jury, notes: list[str], tell: Tell, stage: Path
) -> dict[str, Any]:
    """Rank 0's part: ask, decide, write."""
    keys = _keys(subject, jury)
    kept = Scores(wish.out.parent / SCORES)
    bench = Bench(subject, jury, kept, keys, wish.limit, tell)
    tell("searching", search=wish.search, models=bench.count, total=_total(wish, bench))
    uniform = bench.uniform()
    bench.ask([*map(single, range(bench.count)), *([] if uniform is None else [uniform])])
    if bench.scores[bench.best_single()].value == -math.inf:
        metric = jury.examiner.job.monitor_name
        raise MergeError(
            f"{metric} of every model is no number on the validation data; next: see why, with "
            "`allfuse evaluate`"
        )
    chosen = _run(wish, bench)
    report = make_report(bench, wish.search, chosen, [*notes, *_how(jury, chosen)])
    jury.dismiss()
    result = stage / "result"
    shutil.rmtree(result, ignore_errors=True)
    jury.examiner.write(chosen, result)
    with _told(wish.out):
        _describe(result, subject, report)
        put_in_place(result, wish.out)
    return {**report, "out": str(wish.out)}


def _total(wish: Wish, bench: Bench) -> int:
    """How many candidates there will be, at most; a few more where several are judged at once."""
    own = {
        "greedy": bench.count - 1,
        "methods": len(legal_rules(bench.count, bench.subject.base is not None)),
        "coefficients": EVALUATIONS,
    }
    return wish.limit or bench.count + 1 + own[wish.search]


def _run(wish: Wish, bench: Bench) -> Candidate:
    if wish.search == "greedy":
        return greedy(bench)
    if wish.search == "methods":
        return methods(bench)
    return coefficients(bench, wish.per_layer)


def _keys(subject: Subject, jury: Jury) -> Callable[[Question], str]:
    """What names the file of an answer: a hash of all that it follows from."""
    job, data = jury.examiner.job, jury.examiner.data
    prints = subject.fingerprints()
    common = f"{subject.job.fingerprint()} {versions()}"
    about = {name: f"{common} {fingerprint(job, data[name])}" for name in data}
    return lambda question: subject.key(question[0], prints, about[question[1]])


def _how(jury: Jury, chosen: Candidate) -> list[str]:
    if not jury.examiner.calibrates or chosen.is_single:
        return []
    return ["the statistics of BatchNorm were estimated anew from training data in what is fused"]


def _describe(result: Path, subject: Subject, report: Mapping[str, Any]) -> None:
    """Put the report and the job beside the model, so that it can be measured and predict."""
    replace_bytes(result / NAME, (json.dumps(finite(report), indent=1) + "\n").encode())
    job = subject.job
    record: dict[str, Any] = {
        "plan": "data(1)",
        "command": join(sys.argv),
        "versions": versions(),
        "arguments": dict(job.arguments),
        "job_file": job.original or str(job.path.resolve()),
        "merged": {"search": report["search"], **report["rows"][CHOSEN]},
    }
    run = RunFolder(result, finite(record), None)
    run.copy_job(job.path)
    run.update()
