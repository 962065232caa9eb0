"""Events as TensorBoard files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import UserError
from allfuse.base.events import Event
from allfuse.observe.figures import fractions
from allfuse.observe.wording import choice_rows, start_rows

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_S = 5  # what TensorBoard shows is at most this old


class TensorBoard:
    """A sink that writes curves for `tensorboard --logdir FOLDER`.

    `train/...` has the loss, gradient norm, learning rate, samples/s and bytes fused of each step;
    `share/...` and `busy/...` those of each worker when there are several; `validation/...` and
    `test/...` the metrics. Resuming hides the steps that are done again. A disk that is full does
    not stop training: `warn` is called once and nothing more is written.

    A step costs about 110 µs (9 values, one core of a virtual x86-64 machine).

    Args:
        folder: where the files go; made with the first event.
        warn: told why writing ended; a Python warning by default.

    Raises:
        UserError: the package `tensorboard` is not installed.

    >>> import tempfile
    >>> with TensorBoard(tempfile.mkdtemp()) as sink:
    ...     sink(Event(name="step", time=1.0, rank=0, step=1, data={"loss": 0.5}))
    """

    def __init__(
        self, folder: str | os.PathLike[str], warn: Callable[[str], None] | None = None
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"TensorBoard files were asked for, but the package tensorboard cannot be loaded"
                f" ({error}); install it with `pip install tensorboard`, or leave out --tensorboard"
            ) from error
        self.folder = Path(folder)
        self._make = SummaryWriter
        self._writer: SummaryWriter | None = None
        self._closed = False
        self._warn = warn or (lambda text: warnings.warn(text, RuntimeWarning, stacklevel=3))

    def __call__(self, event: Event) -> None:
        if self._closed:
            return
        try:
            match event.name:
                case "start":
                    self._start(event)
                case "step":
                    self._write(event, _step_values(event.data))
                case "evaluated":
                    split = event.data.get("split", "validation")
                    metrics = event.data.get("metrics") or {}
                    self._write(event, {f"{split}/{name}": metrics[name] for name in metrics})
                case "end":
                    self._opened().flush()
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Write what is left. May be called again."""
        self._closed = True
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                self._fail(error)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _opened(self, purge_step: int | None = None) -> SummaryWriter:
        if self._writer is None:
            self._writer = self._make(str(self.folder), purge_step=purge_step, flush_secs=FLUSH_S)
        return self._writer

    def _start(self, event: Event) -> None:
        resumed = event.data.get("resumed_step")
        writer = self._opened(resumed + 1 if resumed else None)
        rows = [*start_rows(event.data), *choice_rows(event.data)]
        table = "\n".join(f"| {label} | {text} |" for label, text in rows)
        writer.add_text("run", f"| | |\n|---|---|\n{table}", event.step, event.time)

    def _write(self, event: Event, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        # One record for all values of a step: a fifth of the time of as many add_scalar.
        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        file_writer: Any = self._opened().file_writer
        file_writer.add_summary(summary, event.step, event.time)

    def _fail(self, error: OSError) -> None:
        self._closed, self._writer = True, None
        self._warn(f"{self.folder}: no more curves are written ({error}); training goes on")


def _step_values(data: Mapping[str, Any]) -> dict[str, float]:
    samples, seconds = data.get("samples"), data.get("seconds")
    values = {
        "train/loss": data.get("loss"),
        "train/gradient_norm": data.get("grad_norm"),
        "train/learning_rate": data.get("lr"),
        "train/samples_per_second": samples / seconds if samples and seconds else None,
        "train/fused_bytes": data.get("fused_bytes"),
    }
    shares, busy = data.get("shares") or (), data.get("busy") or ()
    if len(shares) > 1:
        values |= {f"share/worker_{i}": part for i, part in enumerate(fractions(shares))}
        values |= {f"busy/worker_{i}": part for i, part in enumerate(busy)}
    return {tag: float(value) for tag, value in values.items() if value is not None}
