"""Who may join a job, and how one is told that one may not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from allfuse.base.errors import UserError
from allfuse.cli.options import refuse_without_roles
from allfuse.hosting import ask_about
from allfuse.launcher.generation import check_on_loss
from allfuse.launcher.token import VARIABLE, find_token
from allfuse.link.endpoint import Endpoint
from allfuse.link.wire import Wire
from allfuse.plan import as_plan
from allfuse.roles.messages import About, Hello, open_letter

TOKEN, OTHER = b"0123456789abcdef", b"fedcba9876543210"


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_a_token_file_is_made_once_for_its_owners_eyes(tmp_path: Path) -> None:
    path = tmp_path / "job.token"
    token = find_token(path, make=True)
    assert token is not None
    assert len(token) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert find_token(path, make=True) == token == find_token(path, make=False)


def test_a_token_comes_from_the_environment_where_no_file_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, TOKEN.decode())
    assert find_token(None, make=False) == TOKEN
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(UserError, match="received 5 bytes; allowed: 16 to"):
        find_token(None, make=False)


def test_a_token_file_that_others_can_read_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.token"
    with pytest.raises(UserError, match="No such file"):
        find_token(path, make=False)
    path.write_bytes(TOKEN)
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        find_token(path, make=False)


@pytest.mark.usefixtures("no_token")
def test_without_any_token_there_is_none() -> None:
    assert find_token(None, make=True) is None


@pytest.mark.parametrize(
    ("listen", "token", "what"),
    [("0.0.0.0:7077", None, "--listen"), (None, Path("t"), "--token-file")],
)
def test_what_needs_a_scheduler_is_refused_without_one(
    listen: str | None, token: Path | None, what: str
) -> None:
    with pytest.raises(UserError, match=what) as refusal:
        refuse_without_roles(as_plan("data(2)"), listen, token)
    assert "sync=asp" in str(refusal.value)
    refuse_without_roles(as_plan("data(2, sync=asp)"), listen, token)


def test_policies_for_losses_have_names() -> None:
    assert check_on_loss("restart") == "restart"
    with pytest.raises(UserError, match="allowed: stop, restart, continue"):
        check_on_loss("panic")


@pytest.mark.usefixtures("no_token")
def test_a_place_where_nobody_listens_is_named() -> None:
    with pytest.raises(UserError, match="nobody answers within 1 s"):
        ask_about("127.0.0.1:9", TOKEN, 1.0)
    with pytest.raises(UserError, match="allowed: HOST:PORT"):
        ask_about("nowhere", TOKEN, 1.0)


def test_who_has_the_token_is_told_what_the_job_is_and_who_has_another_is_not() -> None:
    desk = Wire(Endpoint(loopback=True, encrypt=True, token=TOKEN)).desk()
    over = threading.Event()

    def answer() -> None:
        about = {"arguments": {"lr": 0.1}, "limits": {"steps": 3}, "out": None}
        while not over.is_set():
            for name, letter in desk.receive(0.05):
                assert isinstance(open_letter(letter), Hello)
                desk.send(name, About(plan="data(2, sync=asp)", about=about).letter())
        desk.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        about = ask_about(desk.place, TOKEN, 10.0)
        assert about.arguments == {"lr": 0.1}
        with pytest.raises(UserError, match="a copy of the token file"):
            ask_about(desk.place, OTHER, 10.0)
    finally:
        over.set()
        thread.join()
