"""L4: predicts with a trained run, from its folder: figures of its data, answers for tables."""

from __future__ import annotations

from allfuse.prediction.evaluate import Evaluation, evaluate_run
from allfuse.prediction.restore import Restored, open_run
from allfuse.prediction.score import Summary, predict_file

__all__ = ["Evaluation", "evaluate_run", "Summary", "predict_file", "Restored", "open_run"]
