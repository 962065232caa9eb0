"""What a training script sees, under any plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import Interrupted, UserError
from allfuse.base.events import Bus
from allfuse.job import Hook, Metric, MetricFunction, check_whole, default_forward, on
from allfuse.plan import Plan
from allfuse.split.data import IterableLoader, Loader, Portion, as_source
from allfuse.split.pending import Pending
from allfuse.split.request import Request, make_request
from allfuse.sync.averaging import Averaging
from allfuse.training import averaging
from allfuse.training.balance import Balance, make_balance
from allfuse.training.beginning import begin
from allfuse.training.course import Course
from allfuse.training.ending import end
from allfuse.training.evaluation import measure_together
from allfuse.training.exchange import Figures
from allfuse.training.handing import take_model, take_optimizer
from allfuse.training.keeper import Keeper, Resume
from allfuse.training.learner import Precision
from allfuse.training.loading import Order, make_loader
from allfuse.training.measure import to_device
from allfuse.training.merged import plain_pieces
from allfuse.training.own_loop import differentiate
from allfuse.training.parting import make_split
from allfuse.training.place import Place
from allfuse.training.rounds import Rounds
from allfuse.training.settings import Settings
from allfuse.training.snapshot import write_snapshot
from allfuse.training.state import Scheduler, State
from allfuse.training.step import Step
from allfuse.training.stepper import Stepper
from allfuse.training.survival import Survival
from allfuse.training.telling import Teller
from allfuse.training.wishes import Wishes

if TYPE_CHECKING:
    from allfuse.launcher import World
    from allfuse.training.apart import Apart


def make_apart(place: Place, bus: Bus) -> Apart:
    """A group's side of the scheduler. Loaded where there is one: others start without it."""
    if place.whole.gossips:
        from allfuse.training.gossiping import Gossiping

        return Gossiping(place, bus)
    from allfuse.training.apart import Apart

    return Apart(place, bus)


class Session:
    """Models, optimizers and batches of one training run, under any plan.

    A context manager, made by `af.session`. The same script runs alone, under `allfuse run --plan`,
    and under torchrun. A `world` that was joined for it ends with it.

    Raises:
        PlanError: the plan cannot run here. PeerLost: a worker is lost. NonFiniteLoss: the loss is
        NaN or infinite. Interrupted: Ctrl-C, after a checkpoint was saved.

    Example:
        with af.session(out="runs/x") as s:
            model = s.model(Net)
            optimizer = s.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
            for batch in s.batches(dataset, batch_size=256, epochs=3):
                loss = s.step(batch, loss_fn)
    """

    def __init__(
        self,
        plan: Plan | str | None = None,
        *,
        out: str | Path | None = None,
        resume: Resume = False,
        settings: Settings | None = None,
        world: World | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.place = Place(plan, self.settings.device, self.settings.seed, world)
        self.bus = Bus(self.place.rank)
        is_apart = self.place.whole.outer is not None
        try:
            self.apart = make_apart(self.place, self.bus) if is_apart else None
            kept = (None, False) if is_apart else (out, resume)  # the scheduler keeps the run
            self.keeper = Keeper(self.place, *kept, self.settings.keep, self.bus)
            self.balance = self._make_balance()
        except BaseException as error:
            self.place.close(error)
            raise
        self.split = make_split(self.place)
        self.precision = Precision(self.settings.precision, self.device)
        self.state = State(self.precision)
        self.models, self.learners = self.state.models, self.state.learners
        apart, keep, clip = self.apart, self.keeper, self.settings.clip
        self.stepper = Stepper(
            self.place,
            Wishes(self.place.world.stop_requested),
            self.split,
            clip=clip if apart is None else apart.clip_here(clip),
            accumulate=self.settings.accumulate,
            how_to_go_on=keep.how_to_go_on if apart is None else lambda _: apart.how_to_go_on(),
        )
        self.rounds = Rounds(self.place, self.bus, self.keeper.settle)
        self.survival = Survival(self)
        self.when_main: list[Callable[[Bus], None]] = []
        self.make_loader: Callable[[bool], Any] | None = None
        self.loader_again: Callable[[], Loader | IterableLoader] | None = None  # of the last loop
        self.averages: averaging.Averages | None = None
        about = (self.place, self.bus, self.state, self.stepper, self.rounds, self.settings.seed)
        self.course = Course(*about) if self.apart is None else self.apart.course(*about)
        if self.apart is not None:
            self.apart.facts |= {"out": None if out is None else str(out), "resume": resume}
            self.apart.facts["keep"] = self.settings.keep
            self.apart.capture = lambda: self._capture()[0]
        self.course.told, self.course.interrupted = self._after_step, self._interrupt
        if self.survival.active:
            self.survival.take_part()
        self.teller = Teller(self)
        self.choices: dict[str, str] = dict(self.place.choices)
        self.forwards: list[Callable[[nn.Module, Any], Any]] = []  # of the models, in order
        self.requests: list[Request] = []  # likewise
        self.pending: Pending | None = None  # of a model that is to be cut
        self._resume_at: int | None = None
        self.closers: list[Callable[[], None]] = []  # called at the end, in this order

    # What a script asks about.

    @property
    def plan(self) -> Plan:
        return self.place.whole

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes; of several groups the first's."""
        crew = self.place.world.crew
        return self.place.rank == 0 and (crew is None or crew.index == 0)

    @property
    def steps(self) -> int:
        """Optimizer steps done, one for each batch, those before a resume included."""
        return self.course.cursor.steps

    @property
    def loss(self) -> float:
        """The mean loss of the last step's whole batch; NaN before the first.

        Out of step it is that of a worker's own part. One that never had samples has the loss of
        the run's newest batch once that is over.
        """
        if self.apart is not None and math.isnan(self.teller.loss):
            return self.apart.last_loss
        return self.teller.loss

    @property
    def stop_reason(self) -> str | None:
        """Why training ended, or the last loop over batches; None while it goes on."""
        return self.course.reason

    def due(self, every: int | str | None) -> bool:
        """Whether something that is done every so many steps, or every "epoch", is due now.

        Counts the batch under way once it was learned from: ask after the optimizer's step.
        """
        self.course.close_learned_step()
        last = self.course.last
        if every is None or last is None:
            return False
        if self.apart is not None:
            return self.apart.is_due(every)
        if every == "epoch":
            return last.last
        check_whole("due", "every", every)
        return self.steps % int(every) == 0

    def print(self, *values: Any) -> None:
        """Print on rank 0 only."""
        if self.is_main:
            print(*values, flush=True)

    # What a script hands over.

    def model(
        self,
        build: Callable[[], nn.Module] | nn.Module,
        name: str | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        *,
        keep_whole: Sequence[str] = (),
        cut_also: Sequence[str] = (),
        weights: str | Path | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
    ) -> nn.Module:
        """The model, on this rank's device, with the same weights on every rank.

        `weights` are those to begin with: a safetensors file, or a folder with such files, of which
        each rank reads what it needs. Else they are those that the function draws.

        A plan that cuts models needs to know how this one runs on a batch: `forward(model, batch)`,
        where it is not the default. It is cut when the loop over batches begins; parameters stay
        the same objects, and have the shapes of this rank's pieces from then on. If it is given as
        a function, they have no numbers before, so that no rank needs memory for the whole: a model
        that is run or loaded before gets all. `tensor(n)` does
        not cut modules named in `keep_whole`, and cuts those in `cut_also` however small they are
        (names as in `model.named_modules()`, with * for any part). `loss` is what steps will be
        given: `pipe(n)` counts its time as the last stage's, where it is to find stages that take
        as long.

        A function is called under the session's seed, that of a second model under seed + 1, and
        so on. With several workers BatchNorm uses the statistics of the global batch, unless the
        session was made with batch_statistics="local".
        """
        request = replace(make_request("model", keep_whole, cut_also), loss=loss)
        return take_model(self, build, name, forward, request, weights)

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The same optimizer, known to the session: its gradients are fused before it steps."""
        take_optimizer(self, optimizer)
        return optimizer

    def scheduler(self, scheduler: Any, every: str = "step") -> Any:
        """The same scheduler, stepped by the session: every "step", "epoch" or "evaluation".

        Every step means every one of its optimizer's steps: those that fp16 leaves out, it leaves
        out. An evaluation is what a script tells by `evaluated(value)`.
        """
        self.state.add_scheduler(Scheduler(scheduler, every))
        return scheduler

    def average(self, rule: Averaging) -> None:
        """Average the weights along the steps: `af.EMA(decay=0.999)`, or `af.SWA(start=1000)`.

        The average is written beside the model at the end, is in checkpoints, and is what the
        models hold inside `with s.averaged():`. Under `site` rounds are what counts.

        Raises:
            PlanError: no rank has weights that all agree on. UserError: training has begun.
        """
        self.averages = averaging.make_averages(self, rule)

    def averaged(self) -> AbstractContextManager[None]:
        """For a moment the models hold the average. All ranks ask.

        Raises:
            UserError: there is none yet.
        """
        return averaging.show(self)

    def remember(self, name: str, part: Any) -> Any:
        """Save and restore `part`, which has state_dict and load_state_dict, with checkpoints."""
        self.state.add_part(name, part)
        return part

    def on(self, event: str, function: Callable[..., None]) -> None:
        """Call `function(session, event)` at each event of this name; see `af.on`."""
        hook = on(event, function)
        self.bus.subscribe(lambda happened: hook.function(self, happened), [hook.event])

    def add_hooks(self, hooks: Sequence[Hook]) -> None:
        for hook in hooks:
            self.on(hook.event, hook.function)

    def at_close(self, function: Callable[[], None]) -> None:
        """Call `function()` when the session ends, however it ends."""
        self.closers.append(function)

    def stop(self, reason: str) -> None:
        """Ask to stop training. Any rank may; all do after the same step, the next at the earliest.

        Sites agree when they meet: at rounds and at ends of epochs.
        """
        self.stepper.wishes.ask(reason)

    def end(self, reason: str) -> None:
        """Stop training after this step. For reasons that every rank finds at the same step."""
        self.course.end(reason)

    # The loop.

    def batches(
        self,
        data: Any,
        batch_size: int | None = None,
        epochs: int | None = None,
        *,
        seed: int | None = None,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
        loaders: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        steps: int | None = None,
    ) -> Iterator[Any]:
        """This rank's share of every batch, on its device; every sample of an epoch exactly once.

        `batch_size` is the samples of one step over all workers. Ends after `epochs` or `steps` of
        this loop (None: never for that reason), or when training stops. Breaking out of the loop
        leaves training where it is: sites then do not fuse a last time.

        Loops may follow one another, such as fine-tuning after pretraining. A session that resumes
        goes on in the loop, and with the batch, after its checkpoint. Loops before that one give
        nothing; what a script does between loops is done again, and what that changes is set back
        when the loop begins.
        """
        for name, limit in (("epochs", epochs), ("steps", steps)):
            if limit is not None:
                check_whole("batches", name, limit, least=0)
        number = self.course.enter_loop()
        loader = None
        try:
            source = as_source(data, collate=collate)
            order = Order(
                batch_size=batch_size,
                seed=self.settings.seed if seed is None else seed,
                shuffle=shuffle,
                drop_last=drop_last,
                loaders=loaders,
            )

            def make(agrees: bool = True) -> Loader | IterableLoader:
                return make_loader(source, order, self.place, self.balance, agrees=agrees)

            loader = make() if self.balance is None else self.survival.together("all", make)
            self.make_loader = make
            self.loader_again = lambda: make_loader(source, order, self.place)
            begin(self, source, loader, order, epochs, steps)
            if self.course.was_done(number):
                return
            if self._resume_at is not None:
                self._restore(self._resume_at)
            for portion in self.course.portions(number, loader, epochs, steps):
                yield self._hand_out(portion)
                self._check_weights()
            self._finish_loop()
        finally:
            self.make_loader = None
            self.course.leave_loop()
            if loader is not None:
                loader.close()

    def _hand_out(self, portion: Portion) -> Any:
        """A portion's batch on the device, as a script gets it."""
        batch = to_device(portion.batch, self.device)
        self._note_weights()
        if self.stepper.current is not None:
            self.stepper.current.handed = batch
        return batch

    def _finish_loop(self) -> None:
        """The last round, so that all sites end equal.

        What is saved is the state before it: a run that goes on later, with a higher limit, then
        does what it would have done at once.
        """
        if self.apart is None:
            self.save()
            self.rounds.finish(self.models.values())

    def step(
        self,
        batch: Any,
        loss: Callable[[Any, Any], Any],
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> float:
        """Forward, backward, fusion, clipping, the optimizer's step. The mean loss of the batch.

        `loss(outputs, batch)` returns the mean over the samples, one value for each sample, or
        (sum, count). With several optimizers name the one to step; only its parameters get
        gradients. NaN where a site has no sample of the batch.
        """
        learner = self.state.learner(optimizer)
        model = model if model is not None else self.state.only_model()
        run = forward or default_forward

        def compute(piece: Any) -> Any:
            with self.precision.autocast():
                return loss(run(model, piece), piece)

        def attempt() -> Figures | None:
            self.course.open_step_for(learner)
            return self.stepper.learn(learner, batch, compute)

        def again() -> None:
            nonlocal batch
            portion = self.course.open_again(batch)
            if portion is not None:
                batch = self._hand_out(portion)

        figures = self.survival.step(learner, attempt, again)
        if len(self.learners) == 1:
            self.close_step()
        return math.nan if figures is None else figures.loss

    def backward(
        self,
        loss: Tensor,
        *,
        count: float | None = None,
        last: bool = True,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> float:
        """Backward and fusion, for loops that call `optimizer.step()` themselves.

        `loss` is the mean over `count` things (the samples of the batch unless given). Afterwards
        the gradients are those of the whole batch, so clipping is torch's own. With `last=False`
        they only add up; `count` must then be given. Gradients that were there before stay, as
        with `loss.backward()`. Returns the mean loss of the whole batch.
        """
        return differentiate(self, loss, count, last, optimizer)

    def close_step(self) -> None:
        """Count the open step, fuse weights where a round is due, and tell what happened.

        Called by the session itself when the next batch is asked for; a no-op when none is open.
        """
        self.course.close_step()

    def _check_weights(self) -> None:
        """Refuse what a script did to slices of weights. Raises UserError."""
        for learner in self.learners:
            learner.check_weights()

    def _note_weights(self) -> None:
        for learner in self.learners:
            learner.note_weights()

    def _after_step(self, step: Step) -> None:
        if not self.rounds.active:
            self._check_weights()
        self._note_weights()
        if self.averages is not None:
            averaging.after_step(self, step.portion is not None and step.portion.last)
        if self.balance is not None:
            others = step.portion is not None and len(step.portion.shares) != self.place.parts
            self.balance.hear(*((None, None) if others else (step.portion, step.figures)))
        self.teller.step(step)
        self.keeper.tell_outcomes()

    def _make_balance(self) -> Balance | None:
        """What shares out batches by speed, where the plan says so."""
        return make_balance(self.place, self.settings.accumulate, self._warn)

    def _warn(self, text: str) -> None:
        self.bus.emit("warning", text=text)

    def _interrupt(self) -> None:
        self.save(block=True)
        raise Interrupted(f"interrupted after step {self.steps}; {self.keeper.how_to_go_on()}")

    # Begin, measure, save, end.

    def _capture(self) -> tuple[dict[str, Any], list[Tensor]]:
        state, sooner = self.state.capture()
        own = {**self.course.capture(), "loss": self.loss}
        own["pieces"] = plain_pieces(self.split.pieces())
        own["average"] = None if self.averages is None else self.averages.capture()
        return {**state, **own}, sooner

    def _restore(self, step: int) -> None:
        """Take back the state of a checkpoint: at first what is known by now, and all of it when
        the loop is reached that it was saved in."""
        state = self.keeper.read(step, self.split.pieces())
        reached = self.course.is_in(state)
        self.state.restore(state, complete=reached)
        self.course.restore(state)
        if self.averages is not None:
            self.averages.restore(state.get("average"))
        self.teller.loss = state["loss"]
        self._resume_at = None if reached else step

    def evaluate(
        self,
        metrics: Mapping[str, MetricFunction | Metric],
        data: Any,
        *,
        batch_size: int | None = None,
        name: str = "validation",
        forward: Callable[[nn.Module, Any], Any] | None = None,
        model: nn.Module | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        best: Callable[[dict[str, float]], bool] | None = None,
    ) -> dict[str, float]:
        """The figures over a data set, each sample once, the same on every rank.

        Sites measure the mean of their weights. `best(figures)` says whether they are the best yet.
        """
        self.course.close_learned_step()
        self._check_weights()
        begin = time.perf_counter()
        model = model if model is not None else self.state.only_model()
        source = as_source(data, collate=collate)
        figures, samples = measure_together(
            self, model, source, metrics, batch_size, forward or default_forward
        )
        self._note_weights()  # those of sites became their mean meanwhile
        self.bus.emit(
            "evaluated",
            split=name,
            metrics=figures,
            samples=samples,
            seconds=time.perf_counter() - begin,
            best=best(figures) if best is not None else False,
        )
        return figures

    def evaluated(self, value: float) -> None:
        """Step the schedulers that wait for evaluations, with the monitored value."""
        for scheduler in self.state.schedulers:
            scheduler.evaluated(value)

    def save(self, *, score: float | None = None, block: bool = False) -> None:
        """Save a checkpoint in the background; `block` waits until it is on disk.

        Once for each step, into the run folder; without one nothing is saved. `score` says how good
        it is (higher is better): the best is kept beside the last ones.
        """
        self.course.close_learned_step()
        if self.apart is not None:
            self.apart.save(score)
            return
        if self.keeper.path is not None and self.keeper.checkpoints is None:
            raise UserError(
                "save(): training has not begun, so there is no run folder yet; next: save in or "
                "after a loop over s.batches(...)"
            )
        note = {"steps": self.steps, "plan": str(self.plan)}
        self.keeper.save(self.steps, self._capture, score=score, note=note)
        if block:
            self.keeper.wait()

    def snapshot(self) -> None:
        """Write the weights as they are to `snapshots/step-000100.safetensors` in the run folder,
        to be fused later; sites write the mean of theirs. Without a run folder nothing is written.

        A disk that is full is told by a warning. All ranks ask.
        """
        write_snapshot(self)

    def weights(self) -> dict[str, dict[str, Any]]:
        """The state dicts of the models, whole: under a plan that cuts a model on the first rank of
        a replica, and nothing of it elsewhere. All ranks ask."""
        found = {name: module.state_dict() for name, module in self.models.items()}
        if not self.split.cuts:
            return found
        bring = self.split.whole
        return self.survival.together(
            "all", lambda: {name: bring(values) for name, values in found.items()}
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end(self, error)
