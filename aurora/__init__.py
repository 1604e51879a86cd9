"""Aurora: speculative decoding whose drafters learn from the traffic they serve.

`import aurora` loads neither torch, ray, vllm nor wandb. It refuses to run when the four packages of the project come
from different places: `trainer` and `serve` are common names, and another distribution's package would shadow ours.
"""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

_PACKAGES = ("drafters", "serve", "trainer")


def _check_packages(parent: Path) -> None:
    """Raise ImportError naming the package that some other distribution provides instead of this one."""
    for name in _PACKAGES:
        spec = find_spec(name)
        origin = Path(spec.origin) if spec is not None and spec.origin else None
        if origin is None or origin.parent.parent != parent:
            raise ImportError(
                f"package {name!r} comes from {origin}, not from {parent}: another distribution of that name shadows "
                "it. Install aurora-specdec into an environment of its own."
            )


_check_packages(Path(__file__).resolve().parent.parent)
