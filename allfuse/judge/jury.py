"""Has the processes of a plan examine candidates, each some of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from allfuse.base.tensors import tensor_bytes
from allfuse.judge.candidate import Candidate
from allfuse.judge.examiner import Examiner
from allfuse.judge.measured import Measured
from allfuse.link.base import Link
from allfuse.prediction.agreement import Agreement, Status

Question = tuple[Candidate, str]
"""A candidate, and the name of the data it is to be measured on."""


class Jury:
    """Rank 0 asks; all ranks answer. A world of one exchanges nothing.

    Phases of a round:

    1. rank 0 tells all what is asked: 8 bytes, then a text;
    2. each rank examines every n-th question, beginning with its own number;
    3. all say how long their answers are (48 bytes for each rank), or stop where one failed;
    4. the others send their answers to rank 0.
    """

    def __init__(self, examiner: Examiner, link: Link, device: torch.device) -> None:
        self.examiner, self.link, self.device = examiner, link, device
        self._agreement = Agreement(link, device, "candidates")

    @property
    def size(self) -> int:
        return self.link.size

    def judge(self, questions: Sequence[Question]) -> list[Measured]:
        """The answers, in the order of the questions. On rank 0, while others `serve`.

        Raises:
            What an examiner raised here. PeerLost: one raised elsewhere, or is gone.
        """
        said = [[candidate.plain(), name] for candidate, name in questions]
        self._tell(json.dumps(said).encode())
        answers = self._answer(questions)
        return [answers[place % self.size][place // self.size] for place in range(len(questions))]

    def dismiss(self) -> None:
        """There are no more questions. On rank 0."""
        self._tell(b"")

    def serve(self) -> None:
        """Answer until there are no more questions. On all other ranks."""
        while told := self._tell(b""):
            self._answer([(Candidate.read(plain), name) for plain, name in json.loads(told)])

    def _answer(self, questions: Sequence[Question]) -> list[list[Measured]]:
        """This rank's part; on rank 0 the answers of every rank."""

        def attempt() -> tuple[Status, bytes]:
            own = questions[self.link.rank :: self.size]
            found = [self.examiner.examine(candidate, name).plain() for candidate, name in own]
            text = json.dumps(found).encode()
            return Status(length=len(text)), text

        statuses, text = self._agreement.together(attempt)
        texts = self._agreement.gather(text, [status.length for status in statuses])
        return [[Measured.read(plain) for plain in json.loads(each)] for each in texts]

    def _tell(self, text: bytes) -> bytes:
        """What rank 0 says, on every rank."""
        if self.size == 1:
            return text
        length = torch.tensor([len(text)], device=self.device)
        self.link.broadcast(length, "tell how much is asked").wait()
        if not int(length):
            return b""
        content: Any = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.link.rank == 0:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self.link.broadcast(content, "tell what is asked").wait()
        return bytes(tensor_bytes(content.cpu()))
