"""Nests of tensors, and how batches and buckets are cut."""

from __future__ import annotations

import torch

from allfuse.base.tensors import count_rows, cut_rows, map_nest, split_buckets


def test_rows_are_cut_of_tensors_and_of_lists_of_plain_values() -> None:
    batch = {"x": torch.arange(6).reshape(3, 2), "names": ["a", "b", "c"], "scale": 2.0}
    cut = cut_rows(batch, 1, 3)
    assert cut["x"].tolist() == [[2, 3], [4, 5]]
    assert cut["names"] == ["b", "c"]
    assert cut["scale"] == 2.0
    pair = cut_rows([torch.arange(2), torch.arange(2)], 0, 1)  # as many leaves as rows
    assert [leaf.tolist() for leaf in pair] == [[0], [0]]
    assert count_rows(batch) == 3


def test_a_nest_keeps_its_kind() -> None:
    nest = {"a": [torch.ones(1), (2, 3)]}
    assert map_nest(lambda leaf: leaf * 2, nest) == {"a": [torch.full((1,), 2.0), (4, 6)]}


def test_a_bucket_closes_once_it_is_full_and_the_first_one_sooner() -> None:
    assert split_buckets([3, 3, 3, 3, 3], bucket_bytes=6, first_bytes=2) == [[0], [1, 2], [3, 4]]
    assert split_buckets([9, 1], bucket_bytes=4, first_bytes=4) == [[0], [1]]
    assert split_buckets([], bucket_bytes=4, first_bytes=4) == []
