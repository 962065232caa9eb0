"""What a search found, in figures that can be believed."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from allfuse.base.tensors import map_children
from allfuse.job import Job
from allfuse.judge.bench import Bench
from allfuse.judge.candidate import Candidate
from allfuse.judge.data import TEST, VALIDATION
from allfuse.judge.interval import interval
from allfuse.judge.measured import Measured, figure_of, monitored
from allfuse.judge.subject import Subject

NAME = "merge-report.json"
BEST_SINGLE, UNIFORM, CHOSEN = "best single", "uniform", "chosen"


def make_report(bench: Bench, search: str, chosen: Candidate, notes: list[str]) -> dict[str, Any]:
    """The best single model, all models alike and the one that was chosen, on validation and on
    test data; and all that was judged. Measures these on test data.

    What was chosen is the best of many on the validation data, so that its figure there is too
    good; that on the test data is not.
    """
    job, rows = bench.jury.examiner.job, _rows(bench, chosen)
    ways = list(dict.fromkeys(rows.values()))
    questions = [(way, name) for name in (VALIDATION, TEST) for way in ways]
    found = dict(zip(questions, bench.measure(questions), strict=True))
    figures = {question: _figures(job, measured) for question, measured in found.items()}
    report: dict[str, Any] = {
        "search": search,
        "metric": job.monitor_name,
        "lower_is_better": job.lower_is_better,
        "models": [str(path) for path in bench.subject.models],
        "rows": {
            name: {
                **_plain(way, bench.subject),
                VALIDATION: figures[way, VALIDATION],
                TEST: figures[way, TEST],
            }
            for name, way in rows.items()
        },
        "units": found[chosen, TEST].units,
        "judged": [
            {**_plain(way, bench.subject), VALIDATION: score.figure}
            for way, score in sorted(bench.scores.items(), key=lambda item: -item[1].value)
        ],
        "candidates": len(bench.scores),
        "measured": bench.measured,
        "known_before": len(bench.known),
    }
    single = bench.best_single()
    pairs = {name: (found[chosen, name], found[single, name]) for name in (VALIDATION, TEST)}
    report["gain"] = {name: _gain(job, *pair) for name, pair in pairs.items()}
    report["notes"] = [*notes, *_warnings(bench, chosen, report)]
    return report


def _rows(bench: Bench, chosen: Candidate) -> dict[str, Candidate]:
    uniform = bench.uniform()
    return {
        BEST_SINGLE: bench.best_single(),
        **({} if uniform is None or uniform not in bench.scores else {UNIFORM: uniform}),
        CHOSEN: chosen,
    }


def _plain(candidate: Candidate, subject: Subject) -> dict[str, Any]:
    """What a candidate is."""
    said = candidate.plain()
    return {
        "what": subject.describe(candidate),
        "models": [str(subject.models[model]) for model in candidate.models],
        "rule": "none" if candidate.is_single else said["rule"],
        "weights": said["weights"],
        **({"layers": said["layers"]} if candidate.layers else {}),
    }


def _figures(job: Job, measured: Measured) -> dict[str, Any]:
    figure = functools.partial(figure_of, monitored(job))
    found = interval(measured.parts, figure)
    return {
        "figure": measured.figures[job.monitor_name],
        "interval": None if found is None else list(found),
        "samples": measured.samples,
        "figures": measured.figures,
    }


def _gain(job: Job, chosen: Measured, single: Measured) -> dict[str, Any]:
    """How much better the chosen one is than the best single model: above 0 is better."""
    figure, sign = functools.partial(figure_of, monitored(job)), -1 if job.lower_is_better else 1
    difference = chosen.figures[job.monitor_name] - single.figures[job.monitor_name]
    found = interval(chosen.parts, figure, single.parts)
    ends = None if found is None else sorted(sign * end for end in found)
    return {"figure": sign * difference, "interval": ends}


def _warnings(bench: Bench, chosen: Candidate, report: Mapping[str, Any]) -> list[str]:
    """What whoever takes the result must know."""
    single, notes = bench.best_single(), []
    if chosen.is_single:
        notes.append(
            f"nothing that was tried is better than the best single model on the validation data: "
            f"the result is {bench.subject.describe(chosen)} as it is"
        )
    gain, about = report["gain"][TEST]["figure"], report["gain"][TEST]["interval"]
    if gain < 0:
        unsure = about is not None and about[0] <= 0 <= about[1]
        notes.append(
            f"on the test data what was chosen is worse than the best single model, "
            f"{bench.subject.describe(single)}, by {-gain:.4g}"
            + (", which may be chance: the interval of the difference holds 0" if unsure else "")
        )
    return notes


def finite(value: Any) -> Any:
    """The same nest with None for numbers that JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return map_children(finite, value) if isinstance(value, dict | list | tuple) else value
