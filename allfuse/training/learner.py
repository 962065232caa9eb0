"""One optimizer with its parameters: from a loss to fused, clipped gradients and a step."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from allfuse.base.errors import UserError
from allfuse.base.torch_private import foreach_multiply
from allfuse.fusion.bucket import sparse_gradient
from allfuse.fusion.gradients import GradientFusion
from allfuse.training.pieces import (
    Untouched,
    check_optimizer,
    refuse_changed_gradients,
    refuse_changed_weights,
)

if TYPE_CHECKING:
    from allfuse.fusion import Fuser
    from allfuse.split.base import Split

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast to a shorter type, with loss scaling where its range asks for it (fp16)."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def renew(self) -> None:
        """Forget which gradients of a step under way were scaled back: they are found anew."""
        if self.scaler is not None:
            before, self.scaler = self.scaler, torch.amp.GradScaler(self.device.type)
            self.scaler.load_state_dict(before.state_dict())

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=AUTOCAST[self.name])


class Learner:
    """Differentiates, fuses, clips and steps the parameters of one optimizer.

    Args:
        optimizer: its parameters may be frozen, thawed and added to between steps.
        name_all: gives the names of all parameters of the session's models by their `id`.

    `held` are the names of all that the optimizer holds, in its order. `alone` says that it is the
    only optimizer, so that a backward pass needs no list of inputs.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        name_all: Callable[[], Mapping[int, str]],
        *,
        split: Split,
        fuser: Fuser,
        precision: Precision,
    ) -> None:
        self.optimizer, self.precision, self.split = optimizer, precision, split
        self.link, self._fuser, self._name_all = fuser.link, fuser, name_all
        self.alone = True
        self._unfinished = False  # gradients of pieces that wait for the last one
        self._fused = False  # gradients that may be stepped with
        self._unscaled = False
        self._spent = False  # gradients that a step has used up
        self._aside: list[tuple[Parameter, Tensor]] = []
        self._before: list[tuple[Parameter, Tensor]] = []  # that were added, until the step is done
        self._weights, self._gradients = Untouched(), Untouched()
        self.parameters: list[Parameter] = []
        self.fusion = GradientFusion([], [], fuser)
        if precision.scaler is not None and not self.fusion.is_plain:
            chosen = fuser.fusion
            raise UserError(
                "precision fp16 scales the loss anew now and then, which what rule="
                f"{chosen.rule} and codec={chosen.codec} keep of gradients cannot follow; allowed: "
                "bf16 or fp32 here, or rule=mean with codec=identity"
            )
        self._take_parameters()

    def _take_parameters(self) -> None:
        """Find out what the optimizer holds, and watch for its gradients."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = self._name_all()
        strange = [tuple(p.shape) for p in held if id(p) not in names]
        if strange:
            raise UserError(
                f"the optimizer holds {len(strange)} parameters that no s.model(...) knows (the "
                f"first of shape {strange[0]}); allowed: parameters of what s.model returned; "
                "next: model = s.model(...) first, then an optimizer of model.parameters()"
            )
        known = {id(parameter) for parameter in self.parameters}
        self.held = [names[id(p)] for p in held]
        self._frozen = [p for p in held if not p.requires_grad]
        self.parameters = [p for p in held if p.requires_grad]
        for parameter in self.parameters:
            if id(parameter) not in known:  # what others left there was never fused
                parameter.grad = None
        self.names = [names[id(p)] for p in self.parameters]
        self._sliced = {n: p for n, p in self.named().items() if n in self.split.sliced}
        kept = self.fusion.capture()
        self._make_fusion()
        self.fusion.restore(kept)

    def _make_fusion(self) -> None:
        """Of the parameters that this rank fuses."""
        named = zip(self.names, self.parameters, strict=True)
        fused = {name: parameter for name, parameter in named if self.split.fuses(name)}
        self.fusion = GradientFusion([*fused], [*fused.values()], self._fuser)
        if self.fusion.buckets:
            self.split.watch([*fused.values()], self.fusion.final)

    def take_cut(self) -> None:
        """The model was cut: what is fused has other shapes now."""
        self.fusion.buckets.clear()  # hooks of the parameters still hold on to it
        self._take_parameters()
        check_optimizer(self.optimizer, [id(parameter) for parameter in self._sliced.values()])

    def note_weights(self) -> None:
        """Slices of weights are as they should be."""
        self._weights.note(self._sliced)

    def check_weights(self) -> None:
        """Refuse slices of weights that a script has changed since. Raises UserError."""
        refuse_changed_weights(self._weights.changed())

    def meet_peers(self, fuser: Fuser, kept: Mapping[str, Any] | None) -> None:
        """Fuse with other peers from now on, by a fuser of the same kind; codecs go on from what is
        `kept`. What was begun and not finished is undone."""
        for parameter in self.parameters:
            parameter.grad = None
        for parameter, before in [*self._before, *self._aside]:
            parameter.grad = before
        self._fused = bool(self._before or self._aside)
        self._aside, self._before = [], []
        self._unfinished = False
        rounds = self.fusion.rounds
        self.fusion.buckets.clear()  # hooks of the parameters still hold on to it
        self.link, self._fuser = fuser.link, fuser
        self._make_fusion()
        self.fusion.rounds = rounds
        self.fusion.restore(kept)

    def _has_changed(self) -> bool:
        """Whether parameters were added or thawed since they were taken."""
        held = sum(len(group["params"]) for group in self.optimizer.param_groups)
        return held != len(self.held) or any(p.requires_grad for p in self._frozen)

    def refresh(self) -> None:
        """Before the first piece of a step: take in parameters that were added or thawed."""
        if not self._unfinished and self._has_changed():
            self._take_parameters()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`; with `last` start to fuse them as they become final."""
        if not loss.requires_grad:
            raise UserError(
                "the loss does not depend on any parameter that requires a gradient; allowed: a "
                "loss computed from the model's outputs; next: look for detach(), no_grad() or "
                "item() on the way, and for frozen parameters"
            )
        self._begin()
        if self.precision.scaler is not None:
            loss = self.precision.scaler.scale(loss)
        self.fusion.listening = True
        try:
            self.split.backward(loss, () if self.alone else self.parameters, last)
        finally:
            self.fusion.listening = False

    def collect(self, work: Callable[[Sequence[Parameter] | None], None]) -> None:
        """Have `work` add the gradients of a step, of these parameters; None is all that learn.

        Those that are final are fused at once, where no more is to be known for it than they are:
        other rules than the mean want to know what it is over.
        """
        self._begin()
        self.fusion.listening = self.fusion.is_mean
        try:
            work(None if self.alone else self.parameters)
        finally:
            self.fusion.listening = False

    def _begin(self) -> None:
        if not self._unfinished:
            self.check_weights()
            if self._spent:
                self._clear()
            self._set_aside()
        self._unscaled, self._unfinished = False, True

    def _clear(self) -> None:
        """What zero_grad does, without its record for the profiler: 50 us in a small step."""
        for parameter in self.parameters:
            parameter.grad = None
        self._spent = False

    def clear_spent(self) -> None:
        """Drop gradients that were stepped with, or that nobody fused, where no others come."""
        if not self._fused:
            self._clear()

    def _set_aside(self) -> None:
        """Keep gradients of an earlier backward pass out of the sums; `finish` adds them again.

        They are fused already, and views into the sums where there are any.
        """
        for parameter in self.parameters:
            gradient = parameter.grad
            if gradient is not None:
                kept = gradient.clone() if self.fusion.buckets else gradient
                self._aside.append((parameter, kept))
                parameter.grad = None
        self._before = []

    def finish(self, factor: float) -> None:
        """Wait for the fusions; `factor` corrects gradients that were scaled by a guessed count."""
        self.fusion.finish()
        self.split.spread(self.named())
        if factor != 1.0 and (gradients := self.gradients()):
            foreach_multiply(gradients, factor)
        for parameter, kept in self._aside:
            if parameter.grad is None:
                parameter.grad = kept.clone()
            else:
                parameter.grad.add_(kept)
        self._before, self._aside = self._aside, []
        self._unfinished, self._fused = False, True

    def note_gradients(self) -> None:
        """Gradients are ready for the optimizer."""
        held = {name: p.grad for name, p in self._sliced.items() if p.grad is not None}
        self._gradients.note(held)

    def forget(self) -> None:
        """Drop what was begun and will not be finished."""
        self.fusion.forget()
        self._aside.clear()
        self._unfinished = False

    @property
    def keeps_others(self) -> bool:
        """Whether gradients of an earlier backward pass are still to be added."""
        return bool(self._aside)

    @property
    def may_skip(self) -> bool:
        """Whether the scaler leaves out steps whose gradients are not finite."""
        return self.precision.scaler is not None

    def named(self) -> dict[str, Parameter]:
        return dict(zip(self.names, self.parameters, strict=True))

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def clip(self, largest: float | None) -> Tensor | None:
        """The global norm of the gradient; scales it down to `largest` where it is longer."""
        gradients = self.gradients()
        if not (gradients or self.split.cuts):
            return None
        self.unscale()
        if any(gradient.layout != torch.strided for gradient in gradients):  # was not fused
            raise sparse_gradient(self._find_sparse())
        norm = self.split.norm(
            {
                name: parameter.grad
                for name, parameter in zip(self.names, self.parameters, strict=True)
                if parameter.grad is not None
            }
        )
        if largest is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, largest, norm)
        return norm

    def unscale(self) -> None:
        """Undo the loss's scale, if that was not done, and find out whether anything overflowed: on
        any of the ranks that share the model, so that all leave out the step."""
        scaler = self.precision.scaler
        if scaler is None or self._unscaled or not (self.split.cuts or self.gradients()):
            return
        if self.split.cuts:
            gradients = self.gradients()
            own = any(not bool(gradient.isfinite().all()) for gradient in gradients)
            (found,) = self.split.strongest([float(own)])
            if found and not own and gradients:
                gradients[0].fill_(math.inf)
        scaler.unscale_(self.optimizer)
        self._unscaled = True

    def _find_sparse(self) -> str:
        named = zip(self.names, self.parameters, strict=True)
        return next(n for n, p in named if p.grad is not None and p.grad.layout != torch.strided)

    def step(self) -> None:
        """One optimizer step, left out where fp16 overflowed. Its gradients are spent.

        They are cleared only when the next ones come: freed here, their memory would go back to
        the system, and the forward pass would fault it in again.
        """
        if self.precision.scaler is None:
            self.optimizer.step()
        elif self.gradients():
            self.unscale()
            self.precision.scaler.step(self.optimizer)
            self.precision.scaler.update()
        self._spent = True

    def check_gradients(self) -> None:
        """Refuse a step of the optimizer with gradients that are not those of the whole batch."""
        self.check_weights()
        if self.precision.scaler is None:  # which divides them
            refuse_changed_gradients(self._gradients.changed())
        if self._unfinished:
            raise UserError(
                "optimizer.step() was called while gradients wait for the last piece of the batch; "
                "next: pass last=True (the default) to the last s.backward(...) before the step"
            )
        if not self._fused and self.gradients():  # alone too: the script is to run under any plan
            raise UserError(
                "optimizer.step() was called with gradients that did not come through the session, "
                "which fuses them with those of other workers; next: s.backward(loss) instead of "
                "loss.backward(), once before each step"
            )

    def stepped(self) -> None:
        """The optimizer has stepped: the next step needs gradients of its own."""
        self._fused = False
        self._before = []
        self._gradients.note({})
        self.note_weights()

    def take_step(self, state: Mapping[Any, Any]) -> None:
        """Take the optimizer's state after a step that another rank has done. Rates and the like
        stay, which schedulers step everywhere."""
        optimizer = self.optimizer
        optimizer.load_state_dict(
            {"state": dict(state), "param_groups": optimizer.state_dict()["param_groups"]}
        )
        vars(optimizer)["_opt_called"] = True  # what schedulers of torch look for

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step cannot do without a function that computes the loss again (LBFGS)."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
