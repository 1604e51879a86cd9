"""Pictures of what `aurora` says on a terminal, of a server that runs: top, status, drafters list and doctor.

scripts/terminal_pictures.py --url http://127.0.0.1:8000 --run-dir runs/default --looks 30 --out docs/images
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, RenderableType
from rich.text import Text

from aurora.watch import DEFAULT_URL, Watch, WatchOptions

_SHOWN_RUN_DIR = "runs/default"


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
    draw(said("drafters", "list", f"--run-dir={given.run_dir}", f"--url={given.url}"), 110, "drafters list", given.out)
    draw(said("doctor", f"--run-dir={given.run_dir}"), 120, "doctor", given.out)


def said(*command: str, width: int) -> Text:
    """What a command prints on a terminal so wide, in its colours."""
    env = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(width), "LINES": "60"}
    done = subprocess.run([sys.executable, "-m", "aurora.cli", *command], check=False, capture_output=True, env=env)
    assert done.stdout, done.stderr.decode()
    return Text.from_ansi(done.stdout.decode())


def draw(shown: RenderableType, width: int, name: str, folder: Path) -> None:
    """Write one picture, `width` columns wide, whose letters are the reader's own monospaced ones."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=width, record=True, file=nowhere, force_terminal=True)
        console.print(shown)
        console.save_svg(str(folder / f"terminal-{name.replace(' ', '-')}.svg"), title=f"aurora {name}")


if __name__ == "__main__":
    main()
