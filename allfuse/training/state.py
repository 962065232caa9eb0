"""What a session trains: all that a checkpoint holds, and how it is taken back.

Randomness has no state to keep: generators are seeded in each step from (seed, step, rank).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import CheckpointError, UserError
from allfuse.base.pages import let_go
from allfuse.base.tensors import leaves
from allfuse.training.learner import Learner, Precision

STEPPED_EVERY = ("step", "epoch", "evaluation")


class Scheduler:
    """A learning-rate scheduler and when it is stepped: every "step", "epoch" or "evaluation"."""

    def __init__(self, scheduler: Any, every: str) -> None:
        if every not in STEPPED_EVERY:
            raise UserError(
                f"scheduler(every={every!r}): allowed: {', '.join(map(repr, STEPPED_EVERY))}"
            )
        _refuse_stateless(f"a scheduler of type {type(scheduler).__name__}", scheduler, "step")
        needed = [
            parameter
            for parameter in inspect.signature(scheduler.step).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        if needed and every != "evaluation":
            raise UserError(
                f"scheduler(every={every!r}): {type(scheduler).__name__}.step needs "
                f"{needed[0].name}, a monitored value; next: every='evaluation'"
            )
        self.scheduler, self.every, self._wants_value = scheduler, every, bool(needed)
        self._advanced = 0

    def after_step(self, stepped: list[Learner], ends_epoch: bool) -> None:
        """Step if that is due after a step in which the optimizers of these learners stepped."""
        own = getattr(self.scheduler, "optimizer", None)
        if self.every == "step":
            if any(own is None or learner.optimizer is own for learner in stepped):
                self.scheduler.step()
        elif self.every == "epoch" and ends_epoch:
            self.scheduler.step()

    def advance(self, steps: int, epochs: int) -> None:
        """Step until it stands where so many steps, or epochs, have been done by all."""
        target = {"step": steps, "epoch": epochs}.get(self.every, 0)
        if (own := getattr(self.scheduler, "optimizer", None)) is not None:
            vars(own)["_opt_called"] = True  # elsewhere, or by an earlier leg of the run
        while self._advanced < target:
            self.scheduler.step()
            self._advanced += 1

    def evaluated(self, value: float) -> None:
        """Step if it waits for evaluations, with the monitored value if it wants that."""
        if self.every == "evaluation":
            self.scheduler.step(*([value] if self._wants_value else []))


class State:
    """Models, optimizers, schedulers and other parts that have a state."""

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.models: dict[str, nn.Module] = {}
        self.learners: list[Learner] = []
        self.schedulers: list[Scheduler] = []
        self.parts: dict[str, Any] = {}
        self.elsewhere: frozenset[str] = frozenset()  # what another rank has of the model

    def add_model(self, name: str, module: nn.Module) -> None:
        if name in self.models:
            raise UserError(f"model {name!r} is there already; allowed: another name")
        self.models[name] = module

    def add_learner(self, learner: Learner) -> None:
        self.learners.append(learner)
        for each in self.learners:
            each.alone = len(self.learners) == 1

    def add_scheduler(self, scheduler: Scheduler) -> None:
        self.schedulers.append(scheduler)

    def add_part(self, name: str, part: Any) -> None:
        if name in self.parts:
            raise UserError(f"remember({name!r}): that is there already; allowed: another name")
        _refuse_stateless(f"remember({name!r}): a {type(part).__name__}", part)
        self.parts[name] = part

    def learner(self, optimizer: torch.optim.Optimizer | None) -> Learner:
        """That of an optimizer, or the only one."""
        if optimizer is None and len(self.learners) == 1:
            return self.learners[0]
        for learner in self.learners:
            if learner.optimizer is optimizer:
                return learner
        if optimizer is not None or not self.learners:
            raise UserError(
                "the session does not know the optimizer; next: optimizer = s.optimizer(...) "
                "before the loop"
            )
        raise UserError(
            f"the session has {len(self.learners)} optimizers; next: name the one to step, with "
            "optimizer="
        )

    def only_model(self) -> nn.Module:
        if len(self.models) != 1:
            raise UserError(
                f"the session has {len(self.models)} models; next: "
                f"{'pass model=' if self.models else 'model = s.model(...) first'}"
            )
        return next(iter(self.models.values()))

    def names(self) -> dict[int, str]:
        """The names of all parameters by their `id`."""
        return {
            id(parameter): f"{prefix}.{name}" if len(self.models) > 1 else name
            for prefix, module in self.models.items()
            for name, parameter in module.named_parameters()
        }

    def capture(self) -> tuple[dict[str, Any], list[Tensor]]:
        """The state, with live tensors, and those of them that change before the next step."""
        scaler = self.precision.scaler
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        state = {
            "models": {name: self._held(module) for name, module in self.models.items()},
            "trained": [
                [prefix, name]
                for prefix, module in self.models.items()
                for name, parameter in module.named_parameters()
                if parameter.requires_grad
            ],
            "optimizers": [learner.optimizer.state_dict() for learner in self.learners],
            "optimized": [learner.held for learner in self.learners],
            "schedulers": [each.scheduler.state_dict() for each in self.schedulers],
            "fusions": [learner.fusion.capture() for learner in self.learners],
            "scaler": None if scaler is None else scaler.state_dict(),
            "parts": parts,
        }
        # A forward pass changes buffers; only the script knows when it changes its own parts.
        sooner = [buffer for module in self.models.values() for buffer in module.buffers()]
        sooner += [leaf for leaf in leaves(state["fusions"]) if isinstance(leaf, Tensor)]
        return state, sooner + [leaf for leaf in leaves(parts) if isinstance(leaf, Tensor)]

    def _held(self, module: nn.Module) -> dict[str, Any]:
        """What this rank has of a state dict."""
        found = module.state_dict()
        return {name: value for name, value in found.items() if name not in self.elsewhere}

    def restore(self, state: Mapping[str, Any], *, complete: bool) -> None:
        """Take a state back, in place.

        Args:
            complete: the checkpoint must hold a state for all that is known here.

        A scheduler of which it holds None goes to the step of the state by itself, from step 0,
        whose options the optimizers then have.

        Raises:
            CheckpointError: it is of other models, optimizers, schedulers or parts.
        """
        known: dict[str, dict[Any, Any]] = {
            "models": self.models,
            "optimizers": dict(enumerate(learner.optimizer for learner in self.learners)),
            "schedulers": dict(enumerate(each.scheduler for each in self.schedulers)),
            "parts": self.parts,
        }
        for kind, parts in known.items():
            found = state[kind]
            held = dict(enumerate(found)) if isinstance(found, list) else found
            for key, part in parts.items():
                if kind == "schedulers" and key in held and held[key] is None:
                    steps, epochs = state["cursor"][:2]
                    self.schedulers[key].advance(steps, epochs)
                elif key in held:
                    _load(kind, key, part, held[key], self.elsewhere)
                elif complete:
                    raise _misfit(kind, key, "it holds none of that name")
        for learner, kept in zip(self.learners, state["fusions"], strict=False):
            learner.fusion.restore(kept)
        if self.precision.scaler is not None and state["scaler"] is not None:
            self.precision.scaler.load_state_dict(state["scaler"])

    def kinds(self) -> dict[str, list[str]]:
        """The types of optimizers and schedulers, which a run keeps when it is resumed."""
        return {
            "optimizers": [type(learner.optimizer).__name__ for learner in self.learners],
            "schedulers": [type(each.scheduler).__name__ for each in self.schedulers],
        }

    def fingerprint(self) -> str:
        """A hash of the names and shapes of all weights."""
        shapes = [
            f"{name}.{key}{tuple(value.shape)}"
            for name, module in self.models.items()
            for key, value in module.state_dict().items()
            if isinstance(value, Tensor)
        ]
        return hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]


def _load(kind: str, key: Any, part: Any, held: Any, elsewhere: Collection[str]) -> None:
    try:
        if kind == "models":
            held = _copied(held, part)
        if kind == "models" and elsewhere:
            missing, strange = part.load_state_dict(held, strict=False)
            if wrong := [*(name for name in missing if name not in elsewhere), *strange]:
                raise KeyError(f"{wrong[0]} is missing, or strange")
        else:
            part.load_state_dict(held)
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise _misfit(kind, key, str(error)) from None


def _copied(held: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The same state dict, whose tensors are those of the module already where they fit: a file in
    which they lie is in memory one tensor at a time."""
    own = module.state_dict()
    found = dict(held)
    for name, value in held.items():
        mine = own.get(name)
        if isinstance(value, Tensor) and isinstance(mine, Tensor) and value.shape == mine.shape:
            found[name] = mine.copy_(value)
            let_go(value)
    return found


def _misfit(kind: str, key: Any, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint does not fit the job: {kind} {key}: {reason}; allowed: the models, "
        "optimizers, schedulers and remembered parts that the run was started with"
    )


def _refuse_stateless(what: str, part: Any, *more: str) -> None:
    needed = [*more, "state_dict", "load_state_dict"]
    missing = [name for name in needed if not callable(getattr(part, name, None))]
    if missing:
        raise UserError(f"{what} has no {missing[0]}(); allowed: what has {', '.join(needed)}")
