"""Links of the documentation that leave `docs/`: to the repository where `repo_url` is set, else plain text.

On a code host `[serve/http.py](../serve/http.py)` leads to the file; a site has no such page. A file or directory that
does not exist is a warning, which ends a strict build.
"""

import logging
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks")

# What is code, or a link with its text and target; whichever begins first.
_PARTS = re.compile(
    r"^```.*?^```|(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)|`(?:[^`\n]|\n(?!\n))+`", re.MULTILINE | re.DOTALL
)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """mkdocs calls it with each page's text. `files` are those of `docs/`."""
    source = Path(page.file.abs_src_path)
    root = Path(config.config_file_path).parent
    known = {Path(file.abs_src_path) for file in files if file.abs_src_path}

    def rewrite(found: re.Match[str]) -> str:
        text, target, _ = found.groups()
        if target is None or ":" in target:
            return found[0]
        path = (source.parent / target).resolve()
        if path in known:
            return found[0]
        if not path.exists():
            log.warning("%s: %s leads nowhere", page.file.src_uri, found[0])
            return found[0]
        place = path.relative_to(root).as_posix()
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{place})" if config.repo_url else text

    return _PARTS.sub(rewrite, markdown)
