"""A finished run with servers is executed again from its own book; what cannot be is said why."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crews
import msgpack
import pytest
import torch
from crews import train_crew_into

import allfuse as af
from allfuse.base.errors import AllfuseError, RunError, UserError
from allfuse.cli.verify import verify
from allfuse.jobfile import load_job
from allfuse.roles import office
from allfuse.roles.book import Book
from allfuse.roles.messages import Mail, Message
from allfuse.roles.records import Rebirth
from allfuse.roles.server import Server
from allfuse.store.run import RunFolder
from allfuse.store.tensorfile import read_model, write_tensors
from allfuse.training.loop import train_job
from allfuse.verify import Report, verify_run

ASP = "data(2, topology=central(servers=2), sync=asp)"
JOB = """
import torch
import allfuse as af


def job(steps=6, dropout=0.0, adam=False, saves="epoch") -> af.Job:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(97, 8, generator=generator)
    return af.Job(
        model=lambda: torch.nn.Sequential(
            torch.nn.Linear(8, 9), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(9, 2)
        ),
        train=(x, (x.sum(1) > 0).long()),
        loss=lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02)
        if adam
        else torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
        batch_size=15,
        stop=af.Stop(steps=steps),
        save_every=saves,
    )
"""


def train(folder: Path, plan: str = ASP, *, resume: bool = False, **arguments: Any) -> Path:
    """A run of the job above, as `allfuse train` leaves it."""
    file, run = folder / "small.py", folder / "run"
    file.write_text(JOB)
    job = load_job(file, arguments)
    result = train_crew_into(run, job, plan, resume=resume).result
    assert result.steps == job.stop.steps
    shutil.copy(file, run / "job.py")
    with RunFolder.open(run, lock=True) as record:
        record.update(arguments=arguments)
    return run


def check(run: Path) -> Report:
    return verify_run(run, threads=True)


def change_book(run: Path, statement: str) -> None:
    with sqlite3.connect(run / "scheduler.sqlite") as book:
        assert book.execute(statement).rowcount > 0
    book.close()


@pytest.mark.parametrize(
    "plan",
    [
        ASP,
        "data(2, topology=central(servers=1))",
        "data(2, topology=central(servers=2), sync=ssp(1), codec=int8)",
        "site(2, every=2, sync=asp)",
    ],
)
def test_a_finished_run_is_executed_again_bit_for_bit(tmp_path: Path, plan: str) -> None:
    report = check(train(tmp_path, plan))
    assert report.ok, report.lines()
    assert report.notes[0].endswith("the weights at the end agree bit for bit")


def test_a_run_that_was_stopped_and_went_on_is_executed_again(tmp_path: Path) -> None:
    train(tmp_path, steps=3)
    report = check(train(tmp_path, resume=True, steps=8))
    assert report.ok, report.lines()
    assert report.steps == 8


def test_other_weights_than_the_book_leads_to_are_found(tmp_path: Path) -> None:
    run = train(tmp_path)
    weights = read_model(run / "model.safetensors")
    first = next(iter(weights))
    write_tensors(run / "model.safetensors", {**weights, first: weights[first] + 0.5}, {})
    report = check(run)
    assert not report.ok
    assert report.wrong == [first]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE leases SET loss = loss * 1.01 WHERE lease = 5",
        "UPDATE leases SET count = count + 1 WHERE lease = 5",
        "UPDATE leases SET part = 1 - part WHERE block = 2",
    ],
)
def test_a_book_that_tells_another_story_is_found(tmp_path: Path, statement: str) -> None:
    run = train(tmp_path)
    change_book(run, statement)
    report = check(run)
    assert report.first is not None
    assert report.first.what == "loss"


def test_a_book_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path)
    change_book(run, "DELETE FROM leases WHERE sequence = 4")
    with pytest.raises(AllfuseError, match="never learned from"):
        check(run)


class Died(Exception):
    """What ends a server."""


def kill_servers(monkeypatch: pytest.MonkeyPatch, deaths: dict[int, list[int]]) -> None:
    """Each server dies once it has carried out those orders, and is started again each time."""
    serve = office._serve

    def serve_until(world: Any, server: Server, lines: Any) -> None:
        left, answer = deaths.get(server.index, []), server.answer

        def die_after(sender: str, message: Message) -> Iterator[Mail]:
            yield from answer(sender, message)
            if left and server.applied >= left[0]:
                left.pop(0)
                raise Died

        server.answer = die_after  # type: ignore[method-assign]
        serve(world, server, lines)

    def run_server(index: int) -> None:
        while True:
            try:
                return office.run_server(index)
            except Died:
                pass

    monkeypatch.setattr(office, "_serve", serve_until)
    monkeypatch.setattr(crews, "run_server", run_server)


def rebirths_of(run: Path) -> list[Rebirth]:
    book = Book(run / "scheduler.sqlite")
    try:
        return book.rebirths()
    finally:
        book.close()


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(ASP, marks=pytest.mark.slow),
        "data(2, topology=central(servers=2), sync=asp, codec=int8)",
        pytest.param(
            "data(2, topology=central(servers=2), sync=asp, codec=int8) * tensor(2)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "data(2, topology=central(servers=2), codec=topk(0.3))", marks=pytest.mark.slow
        ),
        pytest.param(
            "site(2, every=2, topology=central(servers=2), sync=asp, fragments=2, codec=int8)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_whose_servers_went_back_to_snapshots_is_executed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    """The optimizers of one shard are steps behind those of the other from then on."""
    kill_servers(monkeypatch, {0: [9], 1: [6, 12]})
    run = train(tmp_path, plan, steps=14, adam=True, saves=2)
    rebirths = rebirths_of(run)
    assert len(rebirths) == 3
    assert any(0 < each.sequence < each.born for each in rebirths)
    report = check(run)
    assert report.ok, report.lines()
    is_equal = report.notes[0].endswith("the weights at the end agree bit for bit")
    assert is_equal or "tensor" in plan  # whose sums are cut otherwise


@pytest.mark.parametrize(
    "plan",
    [
        "data(2, topology=central(servers=2, replicas=1), sync=asp, codec=int8)",
        pytest.param(
            "data(2, topology=central(servers=2, replicas=1), codec=sign)", marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_whose_server_was_made_from_a_copy_is_executed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    """It sends whole weights where the other one goes on to send differences."""
    kill_servers(monkeypatch, {1: [6]})
    run = train(tmp_path, plan, steps=12)
    (rebirth,) = rebirths_of(run)
    assert rebirth.whole
    report = check(run)
    assert report.ok, report.lines()
    assert report.notes[0].endswith("the weights at the end agree bit for bit")


@pytest.mark.slow
def test_a_shard_that_was_set_back_elsewhere_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_servers(monkeypatch, {1: [6]})
    run = train(tmp_path, steps=12)
    (rebirth,) = rebirths_of(run)
    assert rebirth.sequence < rebirth.born
    change_book(run, f"UPDATE facts SET value = x'{pack([[0, *rebirth[1:]]])}' "
        "WHERE name = 'rebirths'")  # fmt: skip
    assert not check(run).ok


def test_a_server_that_was_given_weights_of_a_worker_is_a_gap(tmp_path: Path) -> None:
    run = train(tmp_path)
    lost = [[1, -1, 3, False]]
    change_book(run, f"INSERT INTO facts VALUES ('rebirths', x'{pack(lost)}')")
    with pytest.raises(RunError, match=r"no snapshot, .*: server 1 after order 3"):
        check(run)


@pytest.mark.parametrize("codec", [pytest.param("identity", marks=pytest.mark.slow), "int8"])
def test_a_run_that_went_on_with_a_codec_is_executed_again(tmp_path: Path, codec: str) -> None:
    """What workers had not sent is lost, and no server knows what they hold."""
    plan = f"data(2, topology=central(servers=2), sync=asp, codec={codec})"
    train(tmp_path, plan, steps=5)
    report = check(train(tmp_path, plan, resume=True, steps=10))
    assert report.ok, report.lines()


@pytest.mark.slow
def test_sites_that_went_on_are_a_gap(tmp_path: Path) -> None:
    plan = "site(2, every=2, sync=asp)"
    train(tmp_path, plan, steps=4)
    run = train(tmp_path, plan, resume=True, steps=8)
    with pytest.raises(RunError, match="it was started again after order"):
        check(run)


def pack(value: Any) -> str:
    return bytes(msgpack.packb(value)).hex()


def test_a_lost_worker_is_a_gap_where_it_kept_something_for_itself(tmp_path: Path) -> None:
    lost = "INSERT INTO leases (lease, worker, clock, block, part, state) " \
        "VALUES (99, 'w', 9, 9, 0, 'dropped')"  # fmt: skip
    run = train(tmp_path)
    change_book(run, lost)
    assert check(run).ok
    shutil.rmtree(run)
    run = train(tmp_path, "site(2, every=2, sync=asp)")
    change_book(run, lost)
    with pytest.raises(RunError, match="1 leases were taken back"):
        check(run)


def test_what_cannot_be_executed_again_is_said_why(tmp_path: Path) -> None:
    run = train(tmp_path, dropout=0.1)
    with pytest.raises(RunError, match="its model has dropout"):
        check(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(RunError, match="it has not ended"):
        check(run)
    (run / "job.py").unlink()
    with pytest.raises(RunError, match="a script made it"):
        check(run)


def test_a_run_in_step_has_no_order_of_events(tmp_path: Path) -> None:
    x, y = torch.randn(20, 8), torch.zeros(20, dtype=torch.long)
    job = af.Job(
        model=lambda: torch.nn.Linear(8, 2),
        train=(x, y),
        loss=lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=10,
        stop=af.Stop(steps=1),
    )
    train_job(job, "data(1)", out=tmp_path / "run")
    with pytest.raises(RunError, match="has no scheduler"):
        check(tmp_path / "run")


def test_a_run_has_its_own_plan(tmp_path: Path) -> None:
    run = train(tmp_path)
    with pytest.raises(UserError, match="it is a run, which has its plan"):
        verify(run, plan="data(2)")


def test_a_run_that_came_from_another_plan_is_not_whole(tmp_path: Path) -> None:
    train(tmp_path, steps=4)
    other = "data(2, topology=central(servers=1), sync=ssp(1))"
    train(tmp_path, other, resume=True, steps=6)
    with pytest.raises(RunError, match="it went on from a checkpoint, and its book"):
        check(tmp_path / "run")
