"""Pictures of `aurora status` and `aurora top` for the documentation, of a server that runs.

scripts/terminal_pictures.py --url http://127.0.0.1:8000 --run-dir runs/default --looks 30 --out docs/images
"""

import argparse
import os
import time
from pathlib import Path

from rich.console import Console

from aurora.status_view import Frame
from aurora.watch import DEFAULT_URL, Watch, WatchOptions

_SHOWN_URL = "http://127.0.0.1:8000"


def main() -> None:
    """Look at the server for a while and draw it twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--looks", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    given = parser.parse_args()
    options = WatchOptions((given.url,), run_dir=given.run_dir)
    watch = Watch(options)
    watch.first_look()
    for _ in range(given.looks):
        time.sleep(options.interval)
        watch.look()
    draw(watch.frame(f"top  {_SHOWN_URL}  q quits"), 80, given.out / "top.svg")
    draw(watch.frame(f"status  {_SHOWN_URL}"), 120, given.out / "status.svg")


def draw(frame: Frame, width: int, file: Path) -> None:
    """Write one picture, `width` columns wide."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=width, record=True, file=nowhere, force_terminal=True)
        console.print(frame)
        console.save_svg(str(file), title=f"aurora {frame.title.split()[0]}")


if __name__ == "__main__":
    main()
