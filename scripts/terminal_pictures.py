"""Pictures of what `aurora` says on a terminal, of a server that runs: top, status, drafters list and doctor.

scripts/terminal_pictures.py --url http://127.0.0.1:8000 --run-dir runs/default --looks 30 --out docs/images
"""

import argparse
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, RenderableType
from rich.text import Text

from aurora.watch import DEFAULT_URL, Watch, WatchOptions

_FONTS = re.compile(r"@font-face \{\{.*?\n    \}\}", re.DOTALL)  # from another host, which a picture may not ask
_FORMAT = _FONTS.sub("", CONSOLE_SVG_FORMAT).replace("Fira Code, monospace", "monospace")


def main() -> None:
    """Look at the server for a while and draw it; then say what the commands say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--looks", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    given = parser.parse_args()
    options = WatchOptions((given.url,), run_dir=given.run_dir)
    watch = Watch(options)
    watch.first_look()
    for _ in range(given.looks):
        time.sleep(options.interval)
        watch.look()
    draw(watch.frame(f"top  {DEFAULT_URL}  q quits"), 80, "top", given.out)
    draw(watch.frame(f"status  {DEFAULT_URL}"), 120, "status", given.out)
    for name, flags in (("drafters list", [f"--url={given.url}"]), ("doctor", [])):
        draw(said([*name.split(), f"--run-dir={given.run_dir}", *flags], 120), 120, name, given.out)


def said(command: list[str], width: int) -> Text:
    """What a command prints on a terminal so wide, in its colours."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 60, width, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, "-m", "aurora.cli", *command], stdin=its, stdout=its, env=env)
    os.close(its)
    printed = b""
    with suppress(OSError):  # how a terminal ends whose other side is closed
        while chunk := os.read(ours, 1 << 16):
            printed += chunk
    process.wait()
    os.close(ours)
    text = printed.decode().replace("\r\n", "\n").replace(os.path.realpath(sys.prefix), ".venv")
    return Text.from_ansi(text.rstrip())


def draw(shown: RenderableType, width: int, name: str, folder: Path) -> None:
    """Write one picture, `width` columns wide, whose letters are the reader's own monospaced ones."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=width, record=True, file=nowhere, force_terminal=True)
        console.print(shown)
        console.save_svg(
            str(folder / f"terminal-{name.replace(' ', '-')}.svg"), title=f"aurora {name}", code_format=_FORMAT
        )


if __name__ == "__main__":
    main()
