"""Every command that the documentation shows is run by a test, or says why not; those of ours have flags that exist."""

import re

import pytest

from aurora.alarms import KINDS, UNSAVED
from aurora.cli import _parser
from aurora.options import read_config
from tests.documents import ROOT, Block, aurora_commands, blocks

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
EXECUTED = {"docs/first-hour.md": "tests/tutorial/test_first_hour.py"}  # whole pages, in the order of their blocks
PROMISED = ("README.md", "docs/first-hour.md", "docs/bring-your-own.md", "docs/reports.md", "docs/runbook.md")
# Blocks of pages that carry no marker, by their first line.
ELSEWHERE = {
    "make serve   #": "not run: serves until it is stopped; tests/tutorial runs `aurora serve`, CI runs `make test`",
    "curl http://127.0.0.1:8000/v1/chat/completions": "tests/tutorial/test_first_hour.py",
}
NAMED = {"POLICY": "portfolio", "K": "4", "S": "0"}  # placeholders


def reason(block: Block) -> str:
    """The test that runs it, or why none does; empty if neither is said."""
    if block.marker.startswith(("not run: ", "run by: ")):
        return block.marker
    if block.file in EXECUTED:
        return EXECUTED[block.file]
    return next((why for begin, why in ELSEWHERE.items() if block.text.startswith(begin)), "")


@pytest.mark.parametrize("page", PROMISED)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    found = blocks(page)
    assert found
    unexplained = [f"{block.file}:{block.line}" for block in found if not reason(block)]
    assert not unexplained, "mark them with <!-- not run: reason --> or <!-- run by: test -->"
    for block in found:
        for named in re.findall(r"tests/[\w/]+(?:\.py)?", reason(block)):
            assert (ROOT / named).exists(), f"{block.file}:{block.line} names {named}"


def parse(arguments: list[str]) -> None:
    """As `aurora` would, up to where it would begin to work. Raises SystemExit or UserError."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    assert not rest or known.passes_rest, f"unknown argument {rest[0]}"
    if hasattr(known, "option_port"):
        read_config(known, rest)


def commands(block: Block) -> list[list[str]]:
    """With the placeholders of usage lines given values: `[optional]` as if it were asked for, `...` left out."""
    text = block.text.replace("[", "").replace("]", "").replace(" ...", "")
    for name, value in NAMED.items():
        text = re.sub(rf"\b{name}\b", value, text)
    return list(aurora_commands(text))


@pytest.mark.parametrize("page", PAGES)
def test_every_aurora_command_parses(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(page):
        for arguments in commands(block):
            try:
                parse(arguments)
            except (SystemExit, ValueError) as error:
                raise AssertionError(f"{block.file}:{block.line}: aurora {' '.join(arguments)}: {error}") from error
    assert capsys.readouterr().err == ""


def test_every_alarm_has_a_section_of_the_runbook() -> None:
    sections = re.split(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), flags=re.MULTILINE)[1:]
    found = dict(zip(sections[::2], sections[1::2], strict=True))
    assert {*KINDS, UNSAVED} <= found.keys()
    for name, text in found.items():
        assert name == name.lower()
        parts = ("**Meaning.**", "**Check", "**Action.**") if "**Check and action.**" not in text else ("**Meaning.**",)
        assert all(part in text for part in parts), name


def test_commands_are_found_where_they_stand() -> None:
    text = "X=1\n.venv/bin/aurora serve a \\\n  --port 1 > log 2>&1 &\ncurl x | aurora doctor; echo aurora bench\n"
    text += "cat <<'END'\naurora nonsense\nEND\naurora traffic 'a b.jsonl' # aurora x\n"
    assert list(aurora_commands(text)) == [["serve", "a", "--port", "1"], ["doctor"], ["traffic", "a b.jsonl"]]


def test_the_tutorial_may_run_what_it_shows() -> None:
    marked = [block for block in blocks("docs/first-hour.md") if block.marker]
    assert [block.text.splitlines()[0] for block in marked] == ["make install"], "all else is run as it stands"
