"""Cuts model and data, and tells when a local gradient is final."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from allfuse.split.piece import Piece
from allfuse.split.request import NO_WISHES, Request

if TYPE_CHECKING:
    from allfuse.link import Link
    from allfuse.plan import Plan
    from allfuse.split.pipe.choice import Trial
    from allfuse.split.pipe.pipeline import Pipeline

Run = Callable[[nn.Module], Any]
"""A forward pass of a model over some batch."""


class Split(ABC):
    """How one replica's model lies on its ranks.

    Attributes:
        cuts: whether ranks share the model, which then has to be cut before its first step.
        sliced: names of the parameters of which this rank has a slice.
        pipeline: the stages of this rank, where the model is cut between its layers.
        begins: where stages begin, but the first: modules, and in which of their passes.
    """

    cuts = False
    sliced: frozenset[str] = frozenset()
    pipeline: Pipeline | None = None
    begins: Sequence[tuple[str, int]] = ()

    @property
    def answers(self) -> bool:
        """Whether it is this rank's to tell what the model gave, of those that share the model."""
        return True

    def cut(
        self,
        model: nn.Module,
        runs: Sequence[tuple[int, Run]],
        request: Request = NO_WISHES,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        trial: Trial | None = None,
    ) -> dict[str, str]:
        """Cut a model, in place; what was chosen, in words, by the name of the choice. Parameters
        and buffers keep their names.

        Args:
            runs: forward passes over batches of two different numbers of rows.
            request: what the job wants of it.
            autocast: what the model will run under.
            trial: how parts of it are timed, to find stages that take as long; None: not at all.

        Raises:
            PlanError, UserError: it cannot be cut so; names the module.
        """
        return {}

    @abstractmethod
    def watch(self, parameters: Sequence[Parameter], final: Callable[[int], None]) -> None:
        """Call `final(i)` when parameter i's gradient is final in a backward pass that is last."""

    @abstractmethod
    def backward(self, loss: Tensor, inputs: Sequence[Parameter], last: bool) -> None:
        """Differentiate `loss` into the gradients of `inputs` (all, when empty).

        `last` says that nothing more is added to them in this step.
        """

    def fuses(self, name: str) -> bool:
        """Whether it is this rank that fuses a parameter with other replicas; else another one of
        its replica does, and tells it what came out."""
        return True

    def spread(self, parameters: Mapping[str, Parameter]) -> None:
        """After a fusion: bring the gradients of parameters to the ranks that do not fuse them."""
        return

    def level(self, model: nn.Module) -> None:
        """Make parameters that stages of several ranks use equal, after weights were fused."""
        return

    def meet_mates(
        self, plan: Plan, rank: int, mates: Link, *, tensor: Link, pipe: Link, shard: Link
    ) -> None:
        """After other replicas were lost: go on under this plan, over new links to the same ranks
        as before. What was under way is forgotten."""
        return

    def count(self, model: nn.Module) -> int:
        """Parameters of the whole model."""
        return sum(parameter.numel() for parameter in model.parameters())

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The norm of the gradient of the whole model, of the gradients here by their names."""
        return torch.nn.utils.get_total_norm(list(gradients.values()))

    def strongest(self, numbers: Sequence[float]) -> list[float]:
        """The largest of each number over the ranks that share the model."""
        return list(numbers)

    def pieces(self) -> dict[str, Piece | None]:
        """What this rank has of parameters and buffers that are not whole here, by their names.
        None: nothing."""
        return {}

    def whole(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict as that of the plain model, on the first rank of the replica. Others, which
        must ask too, get an empty one."""
        return dict(values)
