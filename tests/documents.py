"""The shell commands of the documentation, as a reader would copy them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(r"(?:<!-- (?P<marker>[^>]*?) -->\n)?^```sh\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_HEREDOC = re.compile(r"<<'(\w+)'\n.*?^\1$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_SEPARATORS = "|&;\n"


class Block(NamedTuple):
    """One fenced block; marker: what the comment right above it says."""

    file: str
    line: int
    marker: str
    text: str


def blocks(file: str) -> list[Block]:
    """The `sh` blocks of a Markdown file, by its path below the root."""
    page = (ROOT / file).read_text()
    found = _FENCE.finditer(page)
    return [Block(file, page[: f.start("text")].count("\n"), f["marker"] or "", f["text"]) for f in found]


def aurora_commands(text: str) -> Iterator[list[str]]:
    """Arguments of every `aurora` in a block, without what stands in quotes, here-documents and comments."""
    joined = _COMMENT.sub("", _HEREDOC.sub("", text)).replace("\\\n", " ")
    lexer = shlex.shlex(joined, posix=True, punctuation_chars=_SEPARATORS + "<>")
    lexer.whitespace_split, lexer.whitespace, lexer.commenters = True, " \t", ""
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) & set(_SEPARATORS) and set(word) <= set(_SEPARATORS):
            yield from _of_aurora(words)
            words = []
        else:
            words.append(word)


def _of_aurora(words: list[str]) -> Iterator[list[str]]:
    """Up to where its output goes."""
    if words and Path(words[0]).name == "aurora":
        end = next((i for i, word in enumerate(words) if set(word) <= set("<>&")), len(words))
        yield words[1:end]
