"""Matrices of low rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.errors import PlanError
from allfuse.base.keys import mix
from allfuse.codec.base import Error, Shapes, SumCodec

if TYPE_CHECKING:
    from torch import Tensor

    from allfuse.codec.memory import Memory


@dataclass(frozen=True)
class LowRank(SumCodec):
    """PowerSGD: each matrix (n, m) as the product of (n, rank) and (rank, m), by one step of
    subspace iteration that begins with the last round's result (Vogels et al. 2019,
    arXiv:1905.13727, algorithm 1).

    Two rounds, of which the second depends on the first:
      1. P = M Q is summed, and with it all that is no matrix or would not become smaller;
      2. P is made orthonormal, Q = M' P is summed; the sum of all matrices becomes P Q'.

    Tensors of more dims are matrices of (dim 0, all others). What this peer has not sent is its own
    M - P P' M, where the paper takes the difference from the mean of all peers: the sums of both
    over the peers are the same, and one's own is smaller.
    """

    name: ClassVar[str] = "lowrank"
    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.rank) is not int or not 1 <= self.rank <= 1024:
            raise PlanError(
                f"lowrank({self.rank})", "the rank is a whole number from 1 to 1024", "lowrank(4)"
            )

    @property
    def error(self) -> Error:
        return "bounded"

    def matrix(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns of a tensor that is sent as two factors, else None."""
        if len(shape) < 2:
            return None
        rows, columns = shape[0], prod(shape[1:])
        return (rows, columns) if self.rank * (rows + columns) < rows * columns else None

    def summed_elements(self, shapes: Shapes) -> int:
        return sum(
            self.rank * sum(found) if (found := self.matrix(shape)) else prod(shape)
            for shape in shapes
        )

    def rounds(self, block: Tensor, error: Tensor, memory: Memory, seed: int) -> Iterator[Tensor]:
        import torch

        pieces = list(block.split(memory.sizes))
        errors = error.split(memory.sizes)
        cut = [self.matrix(shape) for shape in memory.shapes]
        matrices = {n: pieces[n].view(found) for n, found in enumerate(cut) if found}
        whole = [n for n, found in enumerate(cut) if not found]
        warm = {
            n: memory.kept.get(n, _start(matrix, self.rank, n)) for n, matrix in matrices.items()
        }

        lefts = [matrix @ warm[n] for n, matrix in matrices.items()]
        first = torch.cat([*(left.reshape(-1) for left in lefts), *(pieces[n] for n in whole)])
        yield first
        *summed, rest = first.split([*(left.numel() for left in lefts), sum_of(pieces, whole)])
        bases = {
            n: torch.linalg.qr(flat.view(-1, self.rank)).Q
            for n, flat in zip(matrices, summed, strict=True)
        }
        rights = {n: matrix.T @ bases[n] for n, matrix in matrices.items()}
        for n, right in rights.items():
            errors[n].view_as(matrices[n]).copy_(matrices[n] - bases[n] @ right.T)
        sizes = [pieces[n].numel() for n in whole]
        for n, part in zip(whole, rest.split(sizes), strict=True):
            pieces[n].copy_(part)
            errors[n].zero_()
        if not matrices:
            return
        second = torch.cat([right.reshape(-1) for right in rights.values()])
        yield second
        for (n, right), flat in zip(
            rights.items(), second.split([r.numel() for r in rights.values()]), strict=True
        ):
            memory.kept[n] = flat.view_as(right).clone()
            torch.mm(bases[n], memory.kept[n].T, out=matrices[n])


def sum_of(pieces: list[Tensor], which: list[int]) -> int:
    return sum(pieces[n].numel() for n in which)


def _start(matrix: Tensor, rank: int, number: int) -> Tensor:
    """The first Q of a matrix: normal numbers, the same on all peers."""
    import torch

    columns = matrix.shape[1]
    chance = torch.Generator().manual_seed(mix(columns, rank, number) & (2**63 - 1))
    return torch.randn(columns, rank, generator=chance).to(matrix)
