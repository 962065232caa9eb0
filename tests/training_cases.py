"""Small jobs for the tests of training, and how they are run as threads of this process.

Numbers are float64, so that rounding is 1e-16 and every real difference stands out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.events import Event
from allfuse.job import Job, Stop
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.training.loop import Result, train_job
from allfuse.training.session import Session
from allfuse.training.settings import Settings

torch.set_num_threads(1)  # ranks are threads already, and the models are tiny

TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def ranks(function: Callable[[], Any], plan: str, workers: int) -> list[Any]:
    """What each rank returned; the first failure that is not the mere loss of a peer is raised."""
    results = launch_threads(function, workers, plan=plan)
    failure = first_failure(results)
    if failure is not None:
        raise failure
    return results


def workers_of(plan: str) -> int:
    from allfuse.plan import as_plan

    return as_plan(plan).workers


def under(plan: str, function: Callable[[], Any]) -> list[Any]:
    return ranks(function, plan, workers_of(plan))


@contextlib.contextmanager
def session(**settings: Any) -> Iterator[Session]:
    """A session that takes its plan from the launcher and shows nothing."""
    out, resume = settings.pop("out", None), settings.pop("resume", False)
    plan = settings.pop("plan", None)
    with Session(plan, out=out, resume=resume, settings=Settings(**settings)) as s:
        yield s


def points(count: int, width: int = 4) -> tuple[Tensor, Tensor]:
    """Random inputs and targets that depend on them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    y = torch.tanh(x.sum(dim=1, keepdim=True)) + 0.1 * x[:, :1] ** 2
    return x, y


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def normed_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()


def mse(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.mse_loss(outputs, batch[1])


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], *, exact: bool = False) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if exact:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(
                a[name], b[name], msg=lambda text, n=name: f"{n}: {text}", **TIGHT
            )


def assert_all_equal(results: list[dict[str, Tensor]]) -> None:
    """Every rank ended with the same bits."""
    for other in results[1:]:
        assert_equal(results[0], other, exact=True)


def job(**changes: Any) -> Job:
    """A small regression; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "model": network,
        "train": points(24),
        "loss": mse,
        "optimizer": adam,
        "batch_size": 6,
        "stop": Stop(epochs=2),
    }
    return Job(**{**fields, **changes})


class Recorded:
    """Keeps the events of a session."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def attach(self, s: Session) -> None:
        s.bus.subscribe(self.events.append)

    def named(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]

    def steps(self) -> list[tuple[Any, ...]]:
        """What of the events of steps does not depend on the clock."""
        keys = ("epoch", "loss", "lr", "samples", "shares")
        return [(e.step, *(e.data[key] for key in keys)) for e in self.named("step")]


def train(made: Job, plan: str = "data(1)", **options: Any) -> list[Result]:
    """Train a job under a plan, as threads; what each rank returned."""
    return under(plan, lambda: train_job(made, **options))
