"""Which searches there are, and what is refused of a wish by its words alone. Loads no torch."""

from __future__ import annotations

from allfuse.base.errors import MergeError, nearest

SEARCHES = ("greedy", "coefficients", "methods")


def refuse_search(search: str, per_layer: bool) -> None:
    """Raises MergeError: there is no such search, or it has no weights of layers."""
    if search not in SEARCHES:
        raise MergeError(
            f"--search {search}: there is no such search{nearest(search, SEARCHES)}; "
            f"allowed: {', '.join(SEARCHES)}"
        )
    if per_layer and search != "coefficients":
        raise MergeError(
            f"--per-layer: --search {search} does not look for weights; allowed: with "
            "--search coefficients"
        )


def refuse_counts(search: str, models: int, evaluations: int | None) -> None:
    """Raises MergeError: too few models, or fewer evaluations than there are to begin with."""
    if models < 2:
        raise MergeError(f"--search {search} needs at least 2 models, received {models}")
    if evaluations is not None and evaluations < models + 1:
        raise MergeError(
            f"--evaluations {evaluations}: each of {models} models is judged by itself, and all of "
            f"them together; allowed: {models + 1} or more"
        )
