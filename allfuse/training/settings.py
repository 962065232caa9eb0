"""How a session trains."""

from __future__ import annotations

from dataclasses import dataclass

from allfuse.job import check_training


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a session trains; see `Job` for the meaning of each. `keep`: checkpoints kept."""

    seed: int = 0
    precision: str = "fp32"
    clip: float | None = None
    accumulate: int = 1
    compile: bool = False
    recompute: bool = False
    batch_statistics: str = "global"
    device: str | None = None
    keep: int = 3

    def __post_init__(self) -> None:
        check_training("session", self, whole=("accumulate", "keep"))
