"""Proof instead of belief: a job under its plan against a plain serial loop, step by step."""

from __future__ import annotations

from allfuse.verify.every import Summary, verify_all
from allfuse.verify.past import verify_run
from allfuse.verify.report import Difference, Report, Row
from allfuse.verify.verify import verify_job

__all__ = ["verify_job", "verify_run", "verify_all", "Summary", "Report", "Row", "Difference"]
