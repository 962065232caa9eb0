"""What codecs keep of parameters moves with them when buckets are cut anew."""

from __future__ import annotations

import torch

from allfuse.codec.memory import Memory
from allfuse.fusion.residuals import Residuals


def test_buckets_that_are_under_way_keep_their_memory_while_others_are_cut_anew() -> None:
    """What they keep changes until they are done, so nobody may take it from them."""
    one, two, three = (torch.zeros(n) for n in (2, 3, 4))
    held = Residuals(Memory)
    first = held.of(0, [one, two, three], one)
    first.kept[2] = torch.ones(1)
    for _ in range(2):  # the step that cuts anew, and the next
        under_way = held.of(0, [three, two], three)
        under_way.kept[0] = torch.full((1,), 2.0)
        held.of(1, [one], one)
        assert held.of(0, [three, two], three) is under_way
    assert under_way.kept[0] == 2
    assert len(held.state_dict()) == 3
