"""Every plan with so many ranks, verified on one job."""

from __future__ import annotations

import functools
import json

import pytest
from test_verify import make_job
from torch import nn

from allfuse.base.errors import JobError, UserError
from allfuse.plan import as_plan
from allfuse.training.learner import Learner
from allfuse.verify import every as every_module
from allfuse.verify import verify_all
from allfuse.verify.every import plans_with


@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_all_plans_have_as_many_ranks_and_none_stands_twice(ranks: int) -> None:
    plans = plans_with(ranks)
    assert all(plan.workers == ranks for plan in plans)
    assert len({str(plan) for plan in plans}) == len(plans)
    for name in ("data", "site", "tensor"):
        assert any([axis.name for axis in plan.axes] == [name] for plan in plans)
    assert all(len(plan.axes) <= 3 for plan in plans)


def test_products_of_all_kinds_are_among_them() -> None:
    texts = [str(plan) for plan in plans_with(8)]
    assert "data(2) * tensor(4)" in texts
    assert "site(2, every=3) * data(2) * tensor(2)" in texts


def mine(plans: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_module, "plans_with", lambda ranks: [as_plan(p) for p in plans])


def test_the_table_tells_of_each_plan_whether_it_keeps_its_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine(["data(2)", "site(2, every=3)", "tensor(2)"], monkeypatch)
    told: list[str] = []
    job = functools.partial(make_job, model=lambda: nn.Linear(6, 3))
    found = verify_all(
        job, 2, steps=3, threads=True, on_event=lambda name, **data: told.append(data["line"])
    )
    assert found.ok
    assert [entry.plan for entry in found.entries] == ["data(2)", "site(2, every=3)", "tensor(2)"]
    assert all(" same " in line for line in told)
    assert "3 of the 3 that ran keep their promise" in found.lines()[-1]
    assert json.loads(json.dumps(found.as_dict()))["plans"][2]["report"]["promise"] == "exact"


def test_plans_that_the_job_cannot_run_under_are_told_and_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine(["data(2)", "tensor(5)"], monkeypatch)
    job = functools.partial(make_job, model=lambda: nn.Linear(6, 3))
    found = verify_all(job, 2, steps=2, threads=True)
    assert found.ok
    assert "no layer of the model can be cut into 5" in (found.entries[1].refused or "")
    assert "refused" in found.lines()[2]


def test_a_plan_that_goes_wrong_is_shown_and_fails_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine(["data(2)", "site(2, every=3)"], monkeypatch)
    finish = Learner.finish
    monkeypatch.setattr(Learner, "finish", lambda self, factor: finish(self, factor * 1.01))
    found = verify_all(make_job, 2, steps=2, threads=True)
    assert not found.ok
    assert "DIFFERENT" in found.lines()[1]


def test_a_job_that_runs_under_no_plan_raises_what_the_first_one_did() -> None:
    with pytest.raises(JobError, match="no such file"):
        verify_all("nowhere.py", 2, threads=True)
    with pytest.raises(UserError, match="--ranks 1"):
        plans_with(1)
