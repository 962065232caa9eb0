"""What a search is about: models, the job that judges them, and how what is found is written."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allfuse.base.errors import MergeError
from allfuse.job import Job
from allfuse.jobfile import load_job
from allfuse.judge.candidate import Candidate
from allfuse.merge.grouping import place_of
from allfuse.merge.merge import MEMORY_BYTES
from allfuse.merge.recipe import Part, Recipe, Slice
from allfuse.merge.settings import WEIGHT, Setting
from allfuse.merge.source import Source, open_source
from allfuse.rule.base import Rule
from allfuse.store.run import RunFolder, is_run, source_fingerprint


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """A job, as any process can make it: a file, arguments, and where the file was copied from."""

    path: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)
    original: str | None = None

    def load(self) -> Job:
        """Raises JobError: it cannot be used."""
        return load_job(self.path, self.arguments, self.original)

    def fingerprint(self) -> str:
        """A short hash of what the file does, of what it has imported from beside it, and of the
        arguments. The job has been loaded."""
        folders = {self.path.resolve().parent}
        folders |= {Path(self.original).resolve().parent} if self.original else set()
        beside = sorted(
            Path(file)
            for module in list(sys.modules.values())
            if (file := getattr(module, "__file__", None)) and file.endswith(".py")
            if Path(file).parent in folders and Path(file).is_file()
        )
        prints = [source_fingerprint(file) for file in (self.path, *beside)]
        text = json.dumps([prints, dict(self.arguments)], sort_keys=True, default=repr)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def find_job(models: Sequence[Path], files: Sequence[Path], settings: Mapping[str, Any]) -> JobFile:
    """The job that judges models: the file given, else that of the first run folder among them.

    Args:
        settings: arguments for it; of a run's they replace those it was trained with.

    Raises:
        MergeError: several files, or none and no run folder with a job.
    """
    if len(files) > 1:
        raise MergeError(f"{len(files)} jobs; allowed: one --job, which judges all models")
    if files:
        return JobFile(path=files[0], arguments=dict(settings))
    for model in models:
        folder = RunFolder.open(model) if is_run(model) else None
        if folder is not None and folder.job_path.is_file():
            arguments = {**folder.record.get("arguments", {}), **settings}
            original = folder.record.get("job_file")
            return JobFile(path=folder.job_path, arguments=arguments, original=original)
    raise MergeError(
        "no model is the folder of a run with a job, which says how good a model is; next: --job "
        "job.py"
    )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The models that are fused, and how.

    Attributes:
        models, base: where they are. rule: that the search fuses them by, where it does not look
            for that.
        dtype, seed, allow_nan: as of a `Recipe`.
        calibrate: whether the statistics of BatchNorm are estimated anew in what is fused.
        memory_bytes: that fusing may take, beside the job's model.
    """

    models: tuple[Path, ...]
    job: JobFile
    rule: Rule
    base: Path | None = None
    dtype: str | None = None
    seed: int = 0
    allow_nan: bool = False
    calibrate: bool = True
    memory_bytes: int = MEMORY_BYTES

    def recipe(self, candidate: Candidate) -> Recipe:
        """How a candidate is made. Raises MergeError: it has no meaning."""
        rule = candidate.rule
        return Recipe(
            models=[self.models[model] for model in candidate.models],
            rule=rule,
            weights=candidate.weights,
            base=self.base if rule.of_changes or rule.base_optional else None,
            dtype=self.dtype,
            seed=self.seed,
            allow_nan=self.allow_nan,
            slices=self._slices(candidate),
        )

    def _slices(self, candidate: Candidate) -> list[Slice]:
        """One with other weights in some layers, where the candidate has them."""
        if not candidate.layers:
            return []
        weights = dict(candidate.layers)
        groups = {name: place_of(name)[0] for name in open_source(self.models[0]).entries}
        named = sorted(groups, key=lambda name: (-len(name), name))  # a name may end like another
        parts = []
        for place in range(len(candidate.models)):
            cases = tuple((name, (weights[groups[name]][place],)) for name in named)
            parts.append(Part(place, settings={WEIGHT: Setting(cases)}))
        own = candidate.rule
        based = self.base is not None and (own.of_changes or own.base_optional)
        return [Slice((*parts, *([Part(None)] if based else [])))]

    def describe(self, candidate: Candidate) -> str:
        """A candidate in a few words: one model by its path, others by their numbers from 1, with
        weights where they differ."""
        if candidate.is_single:
            return str(self.models[candidate.models[0]])
        numbers = [str(model + 1) for model in candidate.models]
        if len(set(candidate.weights)) > 1:
            parts = zip(candidate.weights, numbers, strict=True)
            numbers = [f"{weight:.3g}*{number}" for weight, number in parts]
        count = len(candidate.layers)
        layers = f", with weights of their own in {count} layers" if count else ""
        return f"{candidate.rule} of {' + '.join(numbers)}{layers}"

    def fingerprints(self) -> dict[str, str]:
        """Of each model, by its path: a hash of its files. Reads them once."""
        paths = (*self.models, *(() if self.base is None else (self.base,)))
        return {str(path): _digest(open_source(path)) for path in paths}

    def key(self, candidate: Candidate, prints: Mapping[str, str], about: str) -> str:
        """A hash of all that a candidate's figures follow from.

        Args:
            prints: what `fingerprints` gave. about: of the job, the data, and the versions of what
                computes.
        """
        recipe = self.recipe(candidate)
        said = {
            **candidate.plain(),
            "models": [prints[str(model)] for model in recipe.models],
            "base": prints[str(recipe.base)] if recipe.base is not None else None,
            "seed": self.seed,
            "dtype": self.dtype,
            "calibrate": self.calibrate,
            "about": about,
        }
        text = json.dumps(said, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def layers_of(source: Source) -> list[str]:
    """All layers with floating-point numbers, in the order of the file."""
    return list(
        dict.fromkeys(place_of(name)[0] for name, entry in source.entries.items() if entry.is_float)
    )


def _digest(source: Source) -> str:
    """A hash of what a model is, wherever its files are."""
    entries = source.entries.values()
    text = repr((sorted(source.entries.items()), sorted(source.tied.items())))
    for file in sorted({file for entry in entries for file in entry.files}, reverse=True):
        with open(file, "rb") as opened:
            found = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16))
        text = text.replace(repr(file), found.hexdigest())
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
