"""`aurora dashboard`: what others draw, from the tables in `aurora.panels`, `aurora.grafana` and `aurora.metrics`."""

import argparse
from typing import TypeAlias

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_dashboard_commands(commands: _Commands) -> None:
    """Add `aurora dashboard wandb`, `grafana`, `metrics`."""
    dashboard = commands.add_parser("dashboard", help="workspaces and dashboards", allow_abbrev=False)
    kinds = dashboard.add_subparsers(required=True, metavar="COMMAND")
    wandb = kinds.add_parser("wandb", help="create a W&B workspace", allow_abbrev=False)
    wandb.add_argument("--project", default="aurora", metavar="NAME", help="W&B project (default: %(default)s)")
    wandb.add_argument("--entity", metavar="NAME", help="user or team that owns it; default: whose key it is")
    wandb.add_argument(
        "--offline", "--print", action="store_true", help="print the workspace as JSON and ask no server"
    )
    wandb.set_defaults(run=_wandb, passes_rest=False)
    grafana = kinds.add_parser("grafana", help="print Grafana's dashboard as JSON", allow_abbrev=False)
    grafana.set_defaults(run=_grafana, passes_rest=False)
    metrics = kinds.add_parser("metrics", help="print docs/metrics.md", allow_abbrev=False)
    metrics.set_defaults(run=_metrics, passes_rest=False)


def _wandb(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.workspace import WorkspaceOptions, run

    return run(WorkspaceOptions(known.project, known.entity, known.offline))


def _grafana(_known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.grafana import as_json

    print(as_json(), end="")
    return 0


def _metrics(_known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.metrics_page import page

    print(page(), end="")
    return 0
