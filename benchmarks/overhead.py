"""What the session costs with 1 worker: its step over that of a hand-written loop.

Both sides live in one process with 1 thread and take turns; then again in further processes. The
models and batches are those of `step.py`. The tiny one, 650 parameters, shows what the session adds
to a step that does nothing.
"""

from __future__ import annotations

import statistics

import harness
import models

import allfuse as af

TARGET = 1.03
CASES = ("mlp", "cnn", "gpt", "tiny")
PROCESSES = 3  # fresh ones for each model: where memory happens to lie shifts a step by percents
SECONDS = 5.0  # in each process
TURN_S = 0.3


def measure(name: str, ours_first: bool, quick: bool) -> dict[str, harness.Turns]:
    """Runs in a fresh process. What a step of each side takes in each turn."""
    case = models.CASES[name]
    data = case.data()

    def plain_loop() -> models.PlainLoop:
        return models.PlainLoop(models.build(case), case, data, case.share, 1, 0)

    with af.session(quiet=True) as session:
        early = None if ours_first else plain_loop()
        ours = models.SessionLoop(session, case, data, case.share)
        plain, again = early or plain_loop(), plain_loop()
        steps = models.steps_in(plain, 0.01 if quick else TURN_S)
        turns = {
            "allfuse": lambda: ours.run(steps),
            "plain": lambda: plain.run(steps),
            "again": lambda: again.run(steps),
        }
        warm = harness.interleave(turns, 1)
        one_round = sum(turn.wall_s[0] for turn in warm.values())
        found = harness.interleave(turns, 2 if quick else max(2, int(SECONDS / one_round)))
        ours.close()
    return {key: turn.each(steps) for key, turn in found.items()}


def figures(name: str, turns: dict[str, harness.Turns]) -> list[harness.Figure]:
    """The ratio, by the clock and in processor time, and that of two plain loops."""
    ours, plain, again = turns["allfuse"], turns["plain"], turns["again"]
    added = [a - b for a, b in zip(ours.cpu_s, plain.cpu_s, strict=True)]
    told = f"plain step {harness.milliseconds(plain.wall_s)}"
    return [
        harness.figure(
            f"{name}: session over a hand-written loop",
            harness.ratios(ours.wall_s, plain.wall_s),
            target=None if name == "tiny" else TARGET,
            floor=f"{told}; processor time added: {statistics.median(added) * 1e6:.0f} us a step",
        ),
        harness.figure(
            f"{name}: the same in processor time", harness.ratios(ours.cpu_s, plain.cpu_s)
        ),
        harness.figure(
            f"{name}: a second hand-written loop over the first",
            harness.ratios(again.wall_s, plain.wall_s),
            floor="what 1.00 looks like here",
        ),
    ]


def main() -> None:
    options = harness.parse_options(__doc__)
    found: list[harness.Figure] = []
    for name in CASES[-1:] if options.quick else CASES:
        turns = harness.gather(
            af.launch(measure, name, number % 2 == 0, options.quick, workers=1, threads=1)
            for number in range(1 if options.quick else PROCESSES)
        )
        found += figures(name, turns)
    harness.report("overhead", found, options)


if __name__ == "__main__":
    main()
