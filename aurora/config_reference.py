"""`aurora config reference`: every key of the configuration as a Markdown page, from the types that check it."""

from collections.abc import Iterator
from typing import Any, get_args

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from aurora.config import AuroraConfig
from aurora.options import OPTIONS

_HEAD = """# Configuration

Every key, its flag where it has one, its default and its bounds. `aurora config reference` writes this page from the
types that check a configuration.

Later ones win: defaults, the YAML file of `--config FILE`, flags, `--set KEY=VALUE`. `aurora config show` prints what
is in effect, in a form that `--config` reads. An unknown key, a value of the wrong type and one outside its bounds are
refused before anything starts, with exit code 2 and the key's name. Flags that are not Aurora's go to vLLM as they are.
"""
_SIGNS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<"), MinLen: ("min_length", "length ≥")}
_TYPES = {"str": "text", "float": "number", "int": "whole number", "bool": "true, false", "Path": "path"}
_PLAIN = {"cache_dir": "`$XDG_CACHE_HOME/aurora`, else `~/.cache/aurora`"}  # defaults that depend on the machine


def reference() -> str:
    """The page. Each branch is a section named after its key, so that `#trainer-rl` links to it."""
    sections = [_HEAD, *_sections(AuroraConfig, "")]
    return "\n".join(sections)


def _sections(branch: type[BaseModel], path: str) -> Iterator[str]:
    children = {name: field for name, field in branch.model_fields.items() if _branch(field) is not None}
    leaves = {name: field for name, field in branch.model_fields.items() if name not in children}
    title = f"`{path}`" if path else "Top level"
    anchor = path.replace(".", "-") or "top-level"
    rows = [_row(f"{path}.{name}".lstrip("."), field) for name, field in leaves.items()]
    text = " ".join((branch.__doc__ or "").split())
    table = ["| key | flag | type | default | meaning |", "|---|---|---|---|---|", *rows]
    yield "\n".join([f"## {title} {{#{anchor}}}", "", text, "", *table, ""])
    for name, field in children.items():
        child = _branch(field)
        assert child is not None
        yield from _sections(child, f"{path}.{name}".lstrip("."))


def _branch(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _row(key: str, field: FieldInfo) -> str:
    flags = ["MODEL"] if key == "model" else [f"`{option.flag}`" for option in OPTIONS if option.key == key]
    cells = (f"`{key}`", ", ".join(flags), _kind(field), _default(key, field), field.description or "")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _kind(field: FieldInfo) -> str:
    bounds = [f"{_SIGNS[type(m)][1]} {getattr(m, _SIGNS[type(m)][0]):g}" for m in field.metadata if type(m) in _SIGNS]
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(kind: Any) -> str:
    """`Literal["a", "b"]` as its values, `X | None` as X, `tuple[X, ...]` as a list of X."""
    arguments = [a for a in get_args(kind) if a not in (type(None), Ellipsis)]
    if not arguments:
        name = str(getattr(kind, "__name__", kind))
        return _TYPES.get(name, name)
    if all(isinstance(a, str) for a in arguments):
        return ", ".join(f"`{a}`" for a in arguments)
    inner = _type_name(arguments[0])
    return f"list of {inner}" if getattr(kind, "__origin__", None) is tuple else inner


def _default(key: str, field: FieldInfo) -> str:
    if key in _PLAIN:
        return _PLAIN[key]
    value = field.default
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return ", ".join(f"`{each}`" for each in value) or "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
