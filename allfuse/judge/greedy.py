"""The greedy soup: models are added as long as that makes it no worse."""

from __future__ import annotations

from allfuse.judge.bench import Bench
from allfuse.judge.candidate import Candidate, single, together


def greedy(bench: Bench) -> Candidate:
    """Begin with the best model, try to add the others from the second best on, and keep each with
    which the fusion is not worse (Wortsman et al. 2022, arXiv:2203.05482, recipe 1). Models that
    are equally good come in their order.

    Several workers try the next models at the same time, each as if those before it were not
    kept: what comes out is the same, and what is not needed is thrown away.
    """
    scores = bench.scores
    order = sorted(range(bench.count), key=lambda model: -scores[single(model)].value)
    soup, rest = order[:1], order[1:]
    chosen = single(soup[0])
    while rest:
        tried = rest[: bench.workers]
        ways = [together([*soup, model], bench.subject.rule) for model in tried]
        found = bench.ask(ways)
        if not found:
            break
        kept = next((n for n, s in enumerate(found) if s.value >= scores[chosen].value), None)
        if kept is None:
            rest = rest[len(found) :]
        else:
            soup, chosen, rest = [*soup, tried[kept]], ways[kept], rest[kept + 1 :]
    return chosen
