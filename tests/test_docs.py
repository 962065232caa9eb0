"""The documentation is true: links resolve, code runs, commands parse, nothing public is left out.

Conventions of the pages:
- a python block whose first line is `# file: NAME` is a whole file; the others must compile;
- a diff block shows a whole script before (lines without +) and after (lines without -);
- a console block holds commands after `$ ` and what they print.
"""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main

import allfuse as af
from allfuse.base import errors
from allfuse.cli.app import app, main
from allfuse.cli.run import run_script
from allfuse.codec import CODECS
from allfuse.job import EVENTS, Job, Stop
from allfuse.jobfile import load_job_function
from allfuse.plan.axes import AXES
from allfuse.rule import RULES
from allfuse.sync import SYNCS
from allfuse.sync.outer import OUTERS
from allfuse.topology import TOPOLOGIES
from allfuse.training.session import Session
from allfuse.training.settings import Settings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\w*)$")
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its first line of text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        first = self.text.partition("\n")[0]
        return first.removeprefix("# file: ") if first.startswith("# file: ") else None

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    def side(self, other: str) -> str:
        """A diff without the lines of the other side."""
        lines = [line for line in self.text.splitlines() if not line.startswith(other)]
        return "".join(f"{line[1:]}\n" for line in lines)


def read_blocks(page: Path) -> Iterator[Block]:
    language, first, held = None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = FENCE.match(line)
        if fence and language is None:
            language, first, held = fence[1], number + 1, []
        elif fence:
            yield Block(page, first, str(language), "".join(held))
            language = None
        elif language is not None:
            held.append(f"{line}\n")
    assert language is None, f"{page}: a block is not closed"


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
FILES = [block for block in BLOCKS if block.file]
PROGRAMS = ["forms.py", "train_moons.py", "own.py", "launching.py", "accumulate.py", "threads.py"]


def of_language(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def by_place(block: Block) -> str:
    return block.where


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


# Links.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_resolve(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(path), f"{page.name}: there is no heading {target}"


def test_no_page_is_an_orphan() -> None:
    linked = {(page.parent / t.partition("#")[0]).resolve() for page in PAGES
              for t in LINK.findall(prose(page))}  # fmt: skip
    assert {page for page in PAGES if page.parent == DOCS} <= linked


# Code.


@pytest.mark.parametrize("block", of_language("python"), ids=by_place)
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.where, "exec")


@pytest.mark.parametrize("block", of_language("diff"), ids=by_place)
def test_both_sides_of_a_diff_compile(block: Block) -> None:
    assert re.search(r"^[+-]", block.text, flags=re.MULTILINE), "nothing differs"
    compile(block.side("+"), block.where, "exec")
    compile(block.side("-"), block.where, "exec")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the whole files of all pages and the examples, as the current one."""
    for block in FILES:
        assert block.file is not None
        path = tmp_path / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_every_whole_file_is_run_here() -> None:
    others = {"moons.py", "allfuse/rule/power.py", "tests/test_rule_power.py"}
    assert {block.file for block in FILES} == {*PROGRAMS, *others}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs(name: str, folder: Path) -> None:
    runpy.run_path(name, run_name="__main__")


def test_a_script_of_the_pages_runs_with_two_workers(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    allfuse("run", "--plan", "data(2)", "own.py")
    assert capfd.readouterr().out.count("\nloss ") == 1


def scripts() -> Iterator[object]:
    for block in of_language("diff"):
        if "import allfuse as af" in block.text:
            in_examples = re.search("transformers|init_process_group", block.text)  # a twin of it
            marks = [pytest.mark.slow] if in_examples else []
            yield pytest.param(block, id=block.where, marks=marks)


@pytest.mark.parametrize("block", list(scripts()))
def test_an_ordinary_script_runs_and_so_does_what_it_becomes(
    block: Block, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, after = folder / "before.py", folder / "after.py"
    before.write_text(block.side("+"))
    after.write_text(block.side("-"))
    for package in ("sklearn", "transformers"):
        if package in block.text and find_spec(package) is None:
            pytest.skip(f"needs {package}, which is not installed")
    distributed = "init_process_group" in block.text
    af.launch(run_script, str(before), [], workers=2 if distributed else 1)
    af.launch(run_script, str(after), [], workers=2)
    out = capfd.readouterr().out
    if distributed:
        first, second = re.findall(r"^loss (\S+)$", out, flags=re.MULTILINE)
        assert float(first) == pytest.approx(float(second), rel=1e-5)


# Commands.


@dataclass(frozen=True)
class Command:
    where: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def find_commands() -> Iterator[Command]:
    """All commands of the pages and of the examples' first words."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        lines = re.findall(r"^(?:    |\$ )(?=allfuse |torchrun |python )(.+)$", text, re.MULTILINE)
        for line in [*lines, *re.findall(r"`((?:allfuse|torchrun) [^`]+)`", prose(page))]:
            yield Command(page.name, line)
    for path in sorted((ROOT / "examples").glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        for line in said.splitlines():
            if re.match(r"allfuse |torchrun |python ", line):
                yield Command(path.name, line)


COMMANDS = list(dict.fromkeys(find_commands()))
OWN = [command for command in COMMANDS if "allfuse" in command.words]


def allfuse(*words: str) -> None:
    """A command, in this process."""
    app(list(words), standalone_mode=False)


@pytest.mark.parametrize("command", OWN, ids=lambda command: f"{command.where}: {command.text}")
def test_a_command_parses(command: Command) -> None:
    words = command.words[command.words.index("allfuse") + 1 :]
    if words[0].startswith("-"):
        return  # --help and --version
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words[0] in verbs, f"there is no verb {words[0]}"
    if len(words) == 1:
        return  # only talked about
    found = verbs[words[0]].make_context(words[0], words[1:]).params
    plan = found.get("plan")
    if plan and plan != "..." and command.where != "extending.md":
        af.Plan.parse(plan)
    if words[0] == "run":
        stray = [word for word in found["arguments"] or () if word in ("--plan", "--workers")]
        assert not stray, f"{stray[0]} would go to the script"


@pytest.mark.parametrize(
    "command", COMMANDS, ids=lambda command: f"{command.where}: {command.text}"
)
def test_a_command_names_examples_that_are_there(command: Command) -> None:
    for word in command.words:
        if word.startswith("examples/"):
            assert (ROOT / word).is_file()


def test_settings_of_commands_are_arguments_of_their_jobs() -> None:
    if find_spec("sklearn") is None:
        pytest.skip("needs sklearn, which is not installed")
    for command in OWN:
        words = command.words
        jobs = [word for word in words if re.fullmatch(r"examples/\w+\.py", word)]
        names = [
            word.partition("=")[0] for at, word in enumerate(words) if words[at - 1] == "--set"
        ]
        if jobs and names:
            arguments = load_job_function(ROOT / jobs[0]).__code__.co_varnames
            assert set(names) <= set(arguments), command.text


def test_the_page_on_jobs_runs_from_top_to_bottom(folder: Path) -> None:
    (folder / "rows.csv").write_text("y,x\n0.5,-1\n0.0,2.0\n1.0,0.0\n")
    page = DOCS / "writing-a-job.md"
    said = [b.text for b in BLOCKS if b.page == page and b.language == "console"]
    for line in "".join(said).splitlines():
        words = shlex.split(line.removeprefix("$ "))
        assert words[0] == "allfuse"
        allfuse(*words[1:], *([] if words[1] == "evaluate" else ["--quiet"]))
    labels = (folder / "labels.csv").read_text().splitlines()
    assert labels[0] == "prediction,confidence"
    assert len(labels) == 4
    assert (folder / "runs/moons/model.safetensors").is_file()


@pytest.mark.slow
def test_the_commands_of_the_page_on_loops_run(folder: Path) -> None:
    starts = {
        "python": [sys.executable],
        "allfuse": [sys.executable, "-m", "allfuse"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    said = [b.text for b in BLOCKS if b.page.stem == "your-own-loop" and b.language == "console"]
    for line in "".join(said).splitlines():
        first, *others = shlex.split(line.removeprefix("$ "))
        if any(word.startswith("examples/") for word in others):
            continue  # test_examples.py runs those
        subprocess.run([*starts[first], *others], cwd=folder, check=True, timeout=300)


def test_a_refusal_reads_as_the_page_on_concepts_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [b for b in BLOCKS if b.page.stem == "concepts" and b.language == "console"]
    command, told = block.text.split("\n", 1)
    monkeypatch.setattr(sys, "argv", shlex.split(command.removeprefix("$ ")))
    with pytest.raises(SystemExit):
        main()
    assert told in "".join(capsys.readouterr())


# The worked example of extending.md.


def test_a_rule_is_one_file_and_one_line(folder: Path) -> None:
    """Into a copy of the package, as a contributor would add it."""
    shutil.copytree(ROOT / "allfuse", folder / "allfuse", dirs_exist_ok=True)
    (line,) = [b for b in BLOCKS if b.language == "diff" and "RULES" in b.text]
    table = folder / "allfuse/rule/__init__.py"
    assert line.side("+") in table.read_text()
    table.write_text(table.read_text().replace(line.side("+"), line.side("-")))
    program = """
import allfuse, pytest, runpy
assert pytest.main(["-q", "-p", "no:cacheprovider", "tests"]) == 0
from allfuse.cli.app import app
from allfuse.launcher.thread import first_failure, launch_threads
print(allfuse.__file__)
app(["plan", "site(2, every=10, rule=power(3))"], standalone_mode=False)
train = runpy.run_path("threads.py")["train"]
weights = launch_threads(train, 2, plan="site(2, every=2, rule=power(3))")
assert first_failure(weights) is None, weights
mean = launch_threads(train, 2, plan="site(2, every=2, rule=power(1))")
plain = launch_threads(train, 2, plan="site(2, every=2)")
assert weights[0] == weights[1] != plain[0]
assert abs(mean[0] - plain[0]) < 1e-5
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\n{folder}" in done.stdout


# Nothing public is left out.


def mentions(page: str, *names: str) -> list[str]:
    text = (DOCS / page).read_text()
    return [name for name in names if name not in text]


def test_every_field_of_a_job_is_explained() -> None:
    assert not mentions("writing-a-job.md", *(f"`{field.name}`" for field in fields(Job)))
    assert not mentions("writing-a-job.md", *(f"`{field.name}`" for field in fields(Stop)))


def test_every_event_is_explained() -> None:
    assert not mentions("writing-a-job.md", *(f"`{name}`" for name in EVENTS))


def test_everything_public_of_a_session_is_explained() -> None:
    names = [name for name in vars(Session) if not name.startswith("_")]
    assert not mentions("your-own-loop.md", *(f"s.{name}" for name in names))
    assert not mentions("your-own-loop.md", *(f"`{field.name}`" for field in fields(Settings)))


def test_every_axis_keyword_and_choice_is_explained() -> None:
    names = [f"`{axis}(n)`" for axis in AXES]
    names += [f"`{field.name}`" for axis in AXES.values() for field in fields(axis)[1:]]
    for table in (TOPOLOGIES, CODECS, RULES, SYNCS, OUTERS):
        names += [f"`{name}`" for name in table]
    assert not mentions("concepts.md", *names)


def test_every_error_is_explained() -> None:
    found = [
        n
        for n, e in vars(errors).items()
        if isinstance(e, type) and e.__module__ == errors.__name__
    ]
    assert not mentions("extending.md", *(f"`{name}`" for name in found))


def test_every_public_name_is_in_the_docs() -> None:
    text = "".join(page.read_text() for page in PAGES)
    names = [name for name in af.__all__ if not name.startswith("_") and name not in AXES]
    assert not [name for name in names if not re.search(rf"\b(af|allfuse)\.{name}\b", text)]
