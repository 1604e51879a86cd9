"""A W&B workspace of the panels in `aurora.panels`, made with the library wandb-workspaces."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from aurora.config import UserError
from aurora.panels import SECTIONS, Panel

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

_NAME = "Aurora"


@dataclass(frozen=True)
class WorkspaceOptions:
    """Of `aurora dashboard wandb`."""

    project: str = "aurora"
    entity: str | None = None  # user or team that owns the project; None: whoever is logged in
    offline: bool = False  # print the workspace's specification instead of creating it


def run(options: WorkspaceOptions) -> int:
    """Create the workspace and say where it is, or print it as JSON. Raises UserError when W&B refuses."""
    if find_spec("wandb_workspaces") is None:
        raise UserError(
            "aurora dashboard wandb: the package wandb-workspaces is not installed; "
            "`pip install 'aurora-specdec[dashboard]'`"
        )
    if options.offline:
        print(json.dumps(specification(options.project, options.entity or ""), indent=1))
        return 0
    from aurora.dashboard import asking_wandb

    with asking_wandb("aurora dashboard wandb", "print it with --offline") as api:
        workspace = build(options.project, options.entity or api.default_entity or "")
        workspace.save()
    print(f"aurora: the workspace {_NAME!r} is at {workspace.url}")
    return 0


def specification(project: str, entity: str) -> dict[str, Any]:
    """The workspace as W&B stores it; asks no server."""
    tree: dict[str, Any] = build(project, entity)._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return tree


def build(project: str, entity: str) -> "Workspace":
    """The workspace, not yet saved."""
    from wandb_workspaces import workspaces as ws

    sections = [
        ws.Section(name=section.name, panels=[_plot(panel) for panel in section.panels], is_open=True)
        for section in SECTIONS
    ]
    return ws.Workspace(entity=entity, project=project, name=_NAME, sections=sections)


def _plot(panel: Panel) -> Any:
    from wandb_workspaces.reports import v2 as wr

    return wr.LinePlot(
        title=panel.title,
        x=panel.axis,
        y=list(panel.metrics),
        metric_regex=panel.pattern or None,
        title_y=panel.unit or None,
        title_x=panel.axis,
        plot_type="stacked-area" if panel.stacked else None,
        xaxis_format="datetime" if panel.axis == "time_s" else None,
    )
