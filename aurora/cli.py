"""The command `aurora`: parses, then hands over. Every command imports what it needs when it runs.

Exit codes: 0 done, 1 the work failed, 2 the user can put it right (one line on stderr says how), 130 interrupted.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from aurora import __version__
from aurora.command_options import (
    add_bench_options,
    add_curve_options,
    add_down_options,
    add_logs_options,
    add_plan_options,
    add_purge_options,
    add_record_options,
    add_replay_options,
    add_report_options,
    add_simulate_options,
    add_traffic_options,
    add_train_options,
    add_up_options,
)
from aurora.dashboard_command import add_dashboard_commands
from aurora.options import add_config_options, read_config, refuse_controlled, split_model
from aurora.terminal_commands import add_terminal_commands

_Command = Callable[[argparse.Namespace, list[str]], int]
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_SERVE = "Serve MODEL through an OpenAI-compatible endpoint; flags that are not listed go to vLLM as they are."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    known, rest = parser.parse_known_args(argv)
    if rest and not known.passes_rest:
        command_name = next(word for word in argv or sys.argv[1:] if not word.startswith("-"))
        parser.exit(2, f"aurora: error: unknown argument {rest[0]}; see `aurora {command_name} --help`\n")
    command: _Command = known.run
    try:
        return command(known, rest)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        from aurora.config import UserError

        if not isinstance(error, UserError):
            raise
        print(f"aurora: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aurora", allow_abbrev=False, description="Speculative decoding that learns from the traffic it serves."
    )
    parser.add_argument("--version", action="version", version=f"aurora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands, "serve", _serve, "serve a model", _SERVE)
    config = commands.add_parser("config", help="look at the configuration", allow_abbrev=False)
    shown = config.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(shown, "show", _config_show, "print the configuration in effect", "Print the configuration as YAML.")
    reference = shown.add_parser("reference", help="every key, its bounds and meaning (Markdown)", allow_abbrev=False)
    reference.set_defaults(run=_config_reference, passes_rest=False)
    _add_traffic(commands)
    bench = commands.add_parser(
        "bench",
        help="compare speeds with and without speculation",
        usage="aurora bench [MODEL] [flags] [vLLM flags]",
        description="Serve MODEL in several ways at once and compare their speeds; other flags go to vLLM.",
        allow_abbrev=False,
    )
    add_bench_options(bench)
    bench.set_defaults(run=_bench, passes_rest=True)
    record = commands.add_parser(
        "record",
        help="serve a data set once and keep what replaying it needs",
        usage="aurora record DATASET [MODEL] --out DIR [flags] [vLLM flags]",
        allow_abbrev=False,
    )
    add_record_options(record)
    record.set_defaults(run=_record, passes_rest=True)
    replay = commands.add_parser("replay", help="drafters and training over recorded requests", allow_abbrev=False)
    add_replay_options(replay)
    replay.set_defaults(run=_replay, passes_rest=False)
    curves = commands.add_parser("curves", help="draw replays over their requests", allow_abbrev=False)
    add_curve_options(curves)
    curves.set_defaults(run=_curves, passes_rest=False)
    report = commands.add_parser("report", help="compare runs of bench or traffic", allow_abbrev=False)
    add_report_options(report)
    report.set_defaults(run=_report, passes_rest=False)
    train = commands.add_parser("train", help="train a drafter on logged traces", allow_abbrev=False)
    add_train_options(train)
    train.set_defaults(run=_train, passes_rest=False)
    simulate = commands.add_parser("simulate", help="rules for speculation over a trace", allow_abbrev=False)
    add_simulate_options(simulate)
    simulate.set_defaults(run=_simulate, passes_rest=False)
    plan = commands.add_parser("plan", help="replicas, machines and k for a trace and a promise", allow_abbrev=False)
    add_plan_options(plan)
    plan.set_defaults(run=_plan, passes_rest=False)
    traces = commands.add_parser("traces", help="logged traces (`capture.log_dir`)", allow_abbrev=False)
    purge = traces.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "purge", help="remove them", allow_abbrev=False
    )
    add_purge_options(purge)
    purge.set_defaults(run=_purge, passes_rest=False)
    scale = commands.add_parser("scale", help="have more or fewer replicas", allow_abbrev=False)
    scale.add_argument("replicas", type=int, help="servers behind the endpoint")
    scale.add_argument("--run-dir", type=Path, default=Path("runs/default"), metavar="DIR", help="that of the server")
    scale.set_defaults(run=_scale, passes_rest=False)
    add_dashboard_commands(commands)
    add_terminal_commands(commands)
    _add_cluster_commands(commands)
    return parser


def _add_cluster_commands(commands: _Commands) -> None:
    for name, add_options, run, text in (
        ("up", add_up_options, _up, "start a cluster and serve on it"),
        ("down", add_down_options, _down, "stop serving and end the cluster"),
        ("logs", add_logs_options, _logs, "what the actors wrote"),
    ):
        parser = commands.add_parser(name, help=text, allow_abbrev=False)
        add_options(parser)
        parser.set_defaults(run=run, passes_rest=False)


def _add_serve(commands: _Commands, name: str, run: _Command, short: str, text: str) -> None:
    usage = f"aurora {'serve' if run is _serve else 'config show'} [MODEL] [flags] [vLLM flags]"
    parser = commands.add_parser(name, help=short, description=text, usage=usage, allow_abbrev=False)
    add_config_options(parser)
    parser.set_defaults(run=run, passes_rest=True)


def _serve(known: argparse.Namespace, rest: list[str]) -> int:
    config = read_config(known, rest)
    from aurora.launch import serve

    return serve(config)


def _config_show(known: argparse.Namespace, rest: list[str]) -> int:
    import yaml

    tree = read_config(known, rest).model_dump(mode="json")
    print(yaml.safe_dump(tree, sort_keys=False), end="")
    return 0


def _config_reference(_known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.config_reference import reference

    print(reference(), end="")
    return 0


def _purge(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.trace_log import purge

    files, size = purge(known.log, known.older_than_days * 86400)
    print(f"{known.log}: {files} files, {size / (1 << 20):.1f} MiB removed")
    return 0


def _scale(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.scale import scale

    return scale(known.replicas, known.run_dir)


def _add_traffic(commands: _Commands) -> None:
    parser = commands.add_parser("traffic", help="send a stream of prompts and measure", allow_abbrev=False)
    add_traffic_options(parser)
    parser.set_defaults(run=_traffic, passes_rest=False)


def _traffic(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.traffic import TrafficOptions, run

    return run(TrafficOptions(**_options(known)))


def _bench(known: argparse.Namespace, rest: list[str]) -> int:
    from aurora.bench import run
    from aurora.bench_options import BenchOptions, Load

    mine = {"datasets": tuple(known.datasets), "loads": tuple(Load(*each) for each in known.loads)}
    mine |= {"urls": tuple(known.urls)}
    return run(BenchOptions(**_options(known) | mine, **_model_options(rest)))


def _record(known: argparse.Namespace, rest: list[str]) -> int:
    from aurora.record import RecordOptions, run

    return run(RecordOptions(**_options(known), **_model_options(rest)))


def _replay(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.replay import ReplayOptions, run

    return run(ReplayOptions(**_options(known)))


def _curves(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.curves import CurveOptions, run

    return run(CurveOptions(**_options(known) | {"files": tuple(known.files)}))


def _report(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.report import ReportOptions, run

    return run(ReportOptions(tuple(known.files), known.html))


def _train(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.train import TrainOptions, run

    return run(TrainOptions(**_options(known)))


def _plan(known: argparse.Namespace, _rest: list[str]) -> int:
    known.machines, known.nodes = tuple(known.machines), tuple(known.nodes)
    if known.placement:
        from aurora.place import PlaceOptions
        from aurora.place import run as show_placement

        return show_placement(PlaceOptions(**_of(PlaceOptions, known)))
    from aurora.plan import PlanOptions, run

    return run(PlanOptions(**_of(PlanOptions, known)))


def _simulate(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.simulate import SimulateOptions, run

    return run(SimulateOptions(**_options(known)))


def _up(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.cluster_up import UpOptions, up

    return up(UpOptions(**_options(known)))


def _down(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.cluster_up import DownOptions, down

    return down(DownOptions(**_options(known)))


def _logs(known: argparse.Namespace, _rest: list[str]) -> int:
    from aurora.logs import LogsOptions, run

    return run(LogsOptions(**_options(known)))


def _of(options: type[Any], known: argparse.Namespace) -> dict[str, Any]:
    """The flags that these options have."""
    return {field.name: getattr(known, field.name) for field in dataclasses.fields(options)}


def _options(known: argparse.Namespace) -> dict[str, Any]:
    """The flags of a command, without what the parser keeps for itself."""
    return {name: value for name, value in vars(known).items() if name not in ("run", "passes_rest")}


def _model_options(rest: list[str]) -> dict[str, Any]:
    """MODEL and vLLM's flags."""
    from aurora.config import DEFAULT_MODEL

    model, vllm_args = split_model(rest)
    refuse_controlled(vllm_args)
    return {"model": model or DEFAULT_MODEL, "vllm_args": vllm_args}


if __name__ == "__main__":
    sys.exit(main())
