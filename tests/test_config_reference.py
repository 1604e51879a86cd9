from pathlib import Path

from pydantic import BaseModel

from aurora.config import AuroraConfig
from aurora.config_reference import reference

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"


def leaves(branch: type[BaseModel], path: str = "") -> dict[str, str]:
    """Key -> description of everything that can be set."""
    found: dict[str, str] = {}
    for name, field in branch.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= leaves(kind, f"{path}{name}.")
        else:
            found[path + name] = field.description or ""
    return found


def test_every_key_says_what_it_means() -> None:
    assert [key for key, meaning in leaves(AuroraConfig).items() if not meaning] == []


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == reference(), "write it anew: aurora config reference > docs/configuration.md"


def test_the_page_has_a_row_for_every_key() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted(
        leaves(AuroraConfig), key=[r.split("`")[1] for r in rows].index
    )
    (port,) = [row for row in rows if "`server.port`" in row]
    assert (
        port
        == "| `server.port` | `--port` | whole number, ≥ 0, ≤ 65535 | `8000` | port to listen on; 0 takes a free one |"
    )
