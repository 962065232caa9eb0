from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
    random_split,
)

from allfuse.base.errors import DataError
from allfuse.base.tensors import leaves
from allfuse.split.data import ColumnSource, MapSource, Source, Stream, as_source

PICK = np.array([4, 0, 2])


class Pair(NamedTuple):
    x: Any
    y: Any


class Items(Dataset[Any]):
    """A map-style dataset from a function of the index."""

    def __init__(self, size: int, make: Callable[[int], Any]) -> None:
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def fetch(data: Any, indices: Any = PICK, **arguments: Any) -> Any:
    source = as_source(data, **arguments)
    assert isinstance(source, Source)
    return source.fetch(np.asarray(indices, dtype=np.int64))


def same(one: Any, other: Any) -> bool:
    """Equal nests of equal containers, types and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)


@pytest.mark.parametrize(
    ("nest", "expected"),
    [
        (X, X[PICK]),
        ((X, Y), (X[PICK], Y[PICK])),
        ({"x": X, "more": [Y, (Y,)]}, {"x": X[PICK], "more": [Y[PICK], (Y[PICK],)]}),
        (Pair(X, Y.numpy()), Pair(X[PICK], Y[PICK])),
        (X.numpy(), X[PICK]),
        (X.numpy()[::-1], X.flip(0)[PICK]),
        (Y.bool(), Y.bool()[PICK]),
    ],
)
def test_columns_give_the_same_nest_of_the_chosen_rows(nest: Any, expected: Any) -> None:
    assert same(fetch(nest), expected)


def test_arrays_are_shared_not_copied() -> None:
    array = np.zeros((6, 3), dtype=np.float32)
    source = as_source({"x": array})
    array[4] = 7
    assert isinstance(source, ColumnSource)
    assert source.fetch(PICK)["x"][0].tolist() == [7, 7, 7]


def test_an_array_that_cannot_be_written_is_read_from_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6.0))
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fetch(array).tolist() == [4, 0, 2]


DATASETS = {
    "tensors": TensorDataset(X, Y),
    "subset of tensors": Subset(TensorDataset(X, Y), [5, 3, 1, 0, 2]),
    "subset of a subset": Subset(Subset(TensorDataset(X, Y), [5, 3, 1, 0, 2]), [4, 3, 2, 1, 0]),
    "split": random_split(TensorDataset(X, Y), [5, 1], torch.Generator().manual_seed(0))[0],
    "tuples": Items(6, lambda i: (X[i], i)),
    "dicts": Items(6, lambda i: {"x": X[i].numpy(), "name": str(i), "y": i / 2}),
    "a list": [(X[i], int(Y[i])) for i in range(6)],
    "subset of items": Subset(Items(9, lambda i: (X[i % 6], i)), [8, 7, 6, 5, 4]),
    "concatenated": ConcatDataset([TensorDataset(X, Y), TensorDataset(X, Y)]),
}


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_batch_is_what_a_data_loader_gives(name: str, wrapped: bool) -> None:
    data = DATASETS[name]
    batch = next(iter(DataLoader(data, batch_sampler=[PICK.tolist()])))  # type: ignore[arg-type]
    assert same(fetch(DataLoader(data, batch_size=2) if wrapped else data), batch)  # type: ignore[arg-type]


def test_tensors_split_at_random_are_read_by_columns() -> None:
    for name in ("tensors", "split", "subset of a subset"):
        assert isinstance(as_source(DATASETS[name]), ColumnSource)

    class Augmented(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            return [-self.tensors[0][index]]

    assert isinstance(as_source(Augmented(X)), MapSource)
    assert same(fetch(Augmented(X)), [-X[PICK]])


def test_getitems_reads_a_whole_batch() -> None:
    class Whole(Items):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [X[i] for i in indices]

    assert same(fetch(Whole(6, lambda i: 1 / 0)), X[PICK])


def sum_up(samples: list[Any]) -> Any:
    return sum(samples)


def test_a_collate_makes_the_batch() -> None:
    assert fetch([1, 2, 3, 4, 5], collate=sum_up) == 9
    assert same(fetch(X, collate=sum_up), X[PICK].sum(0))
    assert fetch(TensorDataset(X, Y), collate=lambda pairs: [int(y) for _, y in pairs]) == [4, 0, 2]
    loader = DataLoader([1, 2, 3, 4, 5], batch_size=2, collate_fn=sum_up)  # type: ignore[arg-type]
    assert fetch(loader) == 9
    assert same(fetch(loader, collate=lambda samples: samples), [5, 1, 3])


def test_a_data_loaders_settings_are_kept() -> None:
    def prepare(worker: int) -> None: ...

    loader = DataLoader(DATASETS["tuples"], 3, num_workers=2, worker_init_fn=prepare)  # type: ignore[arg-type]
    settings = as_source(loader).settings
    assert (settings.batch_size, settings.shuffle, settings.drop_last) == (3, False, False)
    assert (settings.processes, settings.prepare_worker) == (2, prepare)


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


@pytest.mark.parametrize("data", [Numbers(), DataLoader(Numbers(), 2), map(str, []), {1, 2}])
def test_what_has_no_index_is_a_stream(data: Any) -> None:
    source = as_source(data)
    assert isinstance(source, Stream)
    assert source.size is None
    assert as_source(source) is source


REFUSED = {
    "no samples": ([], "empty"),
    "no rows": (torch.zeros(0, 3), "empty"),
    "no columns": ({}, "empty"),
    "unequal columns": ({"x": X, "y": Y[:5]}, r"\['x'\] has 6, \['y'\] has 5"),
    "a number": ({"x": torch.tensor(1.0)}, r"\['x'\] is a single number"),
    "no array": ({"x": X, "names": ["a"] * 6}, r"\['names'\]\[0\] is a str"),
    "strings": (np.array(["a", "b"]), "cannot become a tensor"),
    "text": ("train.csv", "open the file"),
    "a number alone": (3, "a int cannot be used as data"),
    "no batching": (DataLoader(TensorDataset(X), batch_size=None), "batching switched off"),
    "already cut": (
        DataLoader(TensorDataset(X), sampler=DistributedSampler(TensorDataset(X), 2, 0)),
        "leave it out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_the_reason(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(DataError, match=reason):
        as_source(data)


UNBATCHABLE = {
    "images": (lambda i: torch.zeros(3, 4 + i), r"samples 4 and 0 .*: \(3, 8\) and \(3, 4\)"),
    "later": (lambda i: (torch.zeros(2 if i == 2 else 1), i), r"samples 4 and 2 .* at \[0\]"),
    "arrays": (lambda i: {"x": np.zeros(i)}, r"samples 4 and 0 .* at \['x'\]: \(4,\) and \(0,\)"),
    "lists": (lambda i: list(range(i + 1)), "samples 4 and 0 .*: 5 values and 1 values"),
    "keys": (lambda i: {f"k{i}": 1}, "samples 4 and 0 .*: the keys k4 and the keys k0"),
    "objects": (lambda i: (i, object()), r"sample 4 holds a object at \[1\]"),
    "nothing": (lambda i: None, "sample 4 holds a NoneType"),
    "words": (lambda i: np.array(["a"]), "sample 4 holds a ndarray"),
}


@pytest.mark.parametrize("name", UNBATCHABLE)
def test_samples_that_make_no_batch_are_named_and_collate_is_offered(name: str) -> None:
    make, reason = UNBATCHABLE[name]
    with pytest.raises(DataError, match=f"{reason}.*collate="):
        fetch(Items(6, make))


def test_a_dataset_that_fails_says_at_which_sample() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        fetch(Items(6, lambda i: 1 / i))
    assert caught.value.__notes__ == ["while reading sample 0 of 6"]


DRAWS: dict[str, Callable[[int], Any]] = {
    "python": lambda i: random.random(),
    "python normal": lambda i: random.gauss(0, 1),
    "numpy": lambda i: np.random.rand(),
    "numpy normals": lambda i: np.random.randn(3),
    "torch": lambda i: torch.rand(2),
    "torch normal": lambda i: torch.randn(()),
    "shuffled": lambda i: torch.tensor(random.sample(range(1000), 5)),
    "sometimes": lambda i: random.random() if i == 2 else float(i),
    "reseeds": lambda i: random.Random(i).random() + (random.seed(i) or 0),
}


def values(batch: Any) -> list[Any]:
    return next(leaf.tolist() for leaf in leaves(batch))


@pytest.mark.parametrize("name", DRAWS)
def test_augmentation_depends_on_seed_epoch_and_index_alone(name: str) -> None:
    data = Items(6, DRAWS[name])
    together = values(as_source(data).fetch(np.arange(6), 3, 7))  # type: ignore[union-attr]
    for cut in ([0], [5], [2, 1], [4, 2, 0]):
        source = as_source(data)
        assert isinstance(source, Source)
        for _ in range(2):  # the first time it is not yet known that the dataset draws
            torch.rand(1), random.random(), np.random.randn()
            assert values(source.fetch(np.array(cut), 3, 7)) == [together[i] for i in cut]


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
def test_augmentation_differs_between_samples_epochs_and_seeds(name: str) -> None:
    source = as_source(Items(6, DRAWS[name]))
    assert isinstance(source, Source)
    drawn = [
        str(value)
        for epoch, seed in ((0, 0), (1, 0), (0, 1))
        for value in values(source.fetch(np.arange(6), epoch, seed))
    ]
    assert len(set(drawn)) == 18


@pytest.mark.parametrize("name", DRAWS)
def test_augmentation_leaves_the_processs_generators_alone(name: str) -> None:
    def outside() -> list[Any]:
        numpy = np.random.randn(2).tolist()  # a held back half of a pair would be dropped
        return [random.random(), random.gauss(0, 1), numpy, torch.randn(1).item()]

    def start() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        random.gauss(0, 1)  # the other half of the pair is held back

    start()
    expected = [outside() for _ in range(3)]
    start()
    source = as_source(Items(6, DRAWS[name]), collate=lambda samples: torch.rand(1))
    assert isinstance(source, Source)
    found = []
    for _ in range(3):
        source.fetch(np.arange(6))
        source.fingerprint()
        found.append(outside())
    assert found == expected


def test_getitems_that_draws_is_keyed_by_sample_too() -> None:
    class Whole(Items):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [torch.rand(1) for _ in indices]

    together = fetch(Whole(6, id), range(6))
    assert torch.equal(fetch(Whole(6, id), [3, 1]), together[[3, 1]])


def test_a_collate_that_draws_depends_on_the_seed_the_epoch_and_its_first_sample() -> None:
    def noisy(samples: list[int]) -> Tensor:
        samples.clear()  # run once only: it may use its samples up
        return torch.rand(1)

    source = as_source([1, 2, 3, 4, 5], collate=noisy)
    assert isinstance(source, Source)
    first = source.fetch(PICK, 1, 1)
    torch.rand(1)
    assert torch.equal(source.fetch(PICK, 1, 1), first)
    for indices, epoch, seed in ((PICK[1:], 1, 1), (PICK, 2, 1), (PICK, 1, 2)):
        assert not torch.equal(source.fetch(indices, epoch, seed), first)


FINGERPRINTED: dict[str, Any] = {
    "columns": {"x": X, "y": Y},
    "renamed": {"x": X, "z": Y},
    "another type": {"x": X.double(), "y": Y},
    "another value": {"x": X + 1, "y": Y},
    "fewer": {"x": X[:5], "y": Y[:5]},
    "samples": [(X[i], i) for i in range(6)],
    "words": [("a", i) for i in range(6)],
    "objects": Items(6, lambda i: (object(), i)),
    "augmented": Items(6, lambda i: (torch.rand(1), i)),
    "noise of its own": Items(6, lambda i: (float(np.random.default_rng().random()), i)),
    "a stream": Numbers(),
}


def test_a_fingerprint_is_the_same_each_time_and_differs_between_data_sets() -> None:
    first = {name: as_source(data).fingerprint() for name, data in FINGERPRINTED.items()}
    torch.rand(1)
    again = {name: as_source(data).fingerprint() for name, data in FINGERPRINTED.items()}
    assert first == again
    assert len(set(first.values())) == len(first)


def test_a_fingerprint_reads_three_samples_only() -> None:
    read: list[int] = []
    source = as_source(Items(10**9, lambda i: read.append(i) or i))
    source.fingerprint()
    assert set(read) == {0, 5 * 10**8, 10**9 - 1}


def test_every_source_states_its_promise() -> None:
    assert "exactly once" in as_source(X).promise
    assert "reads the same stream" in as_source(Numbers()).promise
