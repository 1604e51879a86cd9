"""The flags of every command but `aurora serve`; names, defaults and checks are those of the command's options."""

import argparse
from collections.abc import Callable
from pathlib import Path

from aurora.config import DEFAULT_MODEL
from aurora.options import names


def _add_trainer_settings(add: Callable[..., object]) -> None:
    help_set = "any key of the trainer's configuration, for example --set trainer.rl.weight=0.5 (repeatable)"
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help=help_set)


def add_up_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora up`; names and defaults are those of `UpOptions`."""
    add = parser.add_argument
    _add_cluster(add, "cluster file for `ray up` (default: ray_cluster.yaml)")
    add("--dry-run", action="store_true", help="check the file and say what would be done")
    add("--yes", action="store_true", help="do not ask before machines are started")
    add("--replicas", type=int, metavar="N", help="engines that serve (default: the serve nodes at the start)")
    add("--serve", default="", metavar="'MODEL FLAGS'", help="further words of `aurora serve`, in one pair of quotes")


def add_down_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora down`; names and defaults are those of `DownOptions`."""
    _add_cluster(parser.add_argument, "cluster file that `aurora up` was given (default: ray_cluster.yaml)")
    parser.add_argument("--yes", action="store_true", help="do not ask before machines are ended")


def add_logs_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora logs`; names and defaults are those of `LogsOptions`, which checks the values."""
    add = parser.add_argument
    _add_cluster(add, "cluster file that `aurora up` was given; default: what runs on this machine")
    add("--follow", action="store_true", help="go on with what is added, until Ctrl-C")
    add("--lines", type=int, default=100, metavar="N", help="of each file, to begin with (default: %(default)s)")
    add("--run-dir", type=Path, default=Path("runs/default"), metavar="DIR", help="of the server on this machine")


def _add_cluster(add: Callable[..., object], help_file: str) -> None:
    add("file", type=Path, nargs="?", metavar="FILE", help=help_file)
    help_shared = "directory, as the nodes name it, that they all share (default: %(default)s)"
    add("--shared", default="~/shared", metavar="DIR", help=help_shared)


def add_traffic_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora traffic`; names and defaults are those of `TrafficOptions`, which checks the values."""
    add = parser.add_argument
    _add_dataset(add)
    add("--url", default="http://127.0.0.1:8000", help="endpoint (default: %(default)s)")
    add("--model", help="model to ask for; default: the first that the endpoint lists")
    add("--api-key-file", type=Path, metavar="FILE", help="file whose first line is the key; default: AURORA_API_KEY")
    add("--concurrency", type=int, default=4, metavar="N", help="open conversations (default: %(default)s)")
    add("--rate", type=float, metavar="PER_S", help="start conversations at this rate, however many are open")
    add("--max-tokens", type=int, default=128, metavar="N", help="of each answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s")
    add("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the arrival times (default: %(default)s)")
    add("--send-domain", action="store_true", help="label each request with its row's domain, in `metadata`")
    add("--timeout", type=float, default=600.0, metavar="S", help="of each request (default: %(default)s)")
    add("--json", dest="json_file", type=Path, metavar="FILE", help="write the result there too")
    add("--trace", type=Path, metavar="FILE", help="write arrivals and lengths there (.jsonl), for `aurora simulate`")


def _add_dataset(add: Callable[..., object]) -> None:
    """Which conversations: what `read_prompts` takes."""
    add("dataset", metavar="DATASET", help="JSONL file or `datasets` name with `prompt` or `turns` in each row")
    add("--split", default="train", help="split of a `datasets` name (default: %(default)s)")
    add("--variant", help="only rows of this variant")
    add("--domain", help="only rows of this domain")
    add("--limit", type=int, metavar="N", help="the first N conversations")


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora bench`; names and defaults are those of `BenchOptions`, which checks the values.

    MODEL is not among them: like that of `aurora serve` it is found by `split_model`.
    """
    add = parser.add_argument
    add(
        "--dataset",
        dest="datasets",
        action="append",
        default=[],
        metavar="DATASET",
        help="JSONL file or `datasets` name, repeatable; default: a dozen prompts of our own",
    )
    add("--variant", help="only rows of this variant")
    add("--drafter", type=Path, metavar="DIR", help="published drafter to speculate with; default: the untrained one")
    add(
        "--concurrency",
        dest="loads",
        type=_loads,
        default="1,4",
        metavar="N,N[@T]",
        help="requests at once, and their temperature where it is not 0 (default: %(default)s)",
    )
    add("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    add("--requests", type=int, default=4, metavar="N", help="of an arm in a round, times the concurrency (default: 4)")
    add("--max-tokens", type=int, default=64, metavar="N", help="of each answer (default: %(default)s)")
    add(
        "--arms",
        type=names,
        default=("fixed-3", "vllm-ngram", "portfolio"),
        metavar="ARM,ARM",
        help=(
            "beside no speculation: fixed-K (1 to 16 drafts of the neural drafter for all), table-K (of the n-gram "
            "table), vllm-ngram, vllm-batch-table, table, portfolio, learning (default: fixed-3,vllm-ngram,portfolio)"
        ),
    )
    add(
        "--batch-table",
        type=_pairs,
        default="1:4,2:3,4:2,8:1,12:0",
        metavar="N:K,N:K",
        help="lengths of vllm-batch-table, each from a number of requests on (default: %(default)s, which `aurora "
        "simulate` finds for the default model on two cores)",
    )
    add(
        "--url",
        dest="urls",
        type=_named_url,
        action="append",
        default=[],
        metavar="NAME=URL",
        help="compare endpoints that run already, whatever serves them; the first is the baseline (repeatable)",
    )
    add("--json", dest="json_file", type=Path, metavar="FILE", help="keep every round there; a run cut off goes on")
    add("--html", type=Path, metavar="FILE", help="write a report there: one page that needs nothing else")
    add("--results", type=Path, metavar="FILE", help="put rows of results there")
    add("--experiment", default="live", metavar="NAME", help="of these rows (default: %(default)s)")
    add("--cell", default="", metavar="NAME", help="of the prompts in these rows; default: the data set's name")


def add_purge_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora traces purge`."""
    parser.add_argument("log", type=Path, metavar="DIR", help="`capture.log_dir` of a server")
    parser.add_argument(
        "--older-than-days", type=float, default=0.0, metavar="D", help="only what is older; default: everything"
    )


def add_record_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora record`; names and defaults are those of `RecordOptions`, which checks the values.

    MODEL and flags of vLLM's follow DATASET, as `split_model` finds them.
    """
    add = parser.add_argument
    _add_dataset(add)
    add("--out", type=Path, required=True, metavar="DIR", help="recording: a new directory, or one to continue")
    add("--per-domain", type=int, metavar="N", help="the first N conversations of each domain")
    add("--concurrency", type=int, default=32, metavar="N", help="open conversations (default: %(default)s)")
    add("--max-tokens", type=int, default=128, metavar="N", help="of each answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s")
    add("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    add("--top-k", type=int, default=0, metavar="N", help="default: unlimited")
    add("--seed", type=int, default=0, metavar="N", help="of sampled answers (default: %(default)s)")
    add("--max-gib", type=float, default=8.0, metavar="GIB", help="stop when it has this size (default: %(default)s)")


def add_replay_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora replay`; names and defaults are those of `ReplayOptions`, which checks the values."""
    add = parser.add_argument
    add("recording", type=Path, metavar="RECORDING", help="directory that `aurora record` made")
    add("--dataset", required=True, metavar="DATASET", help="the order of arrival; rows not recorded are passed over")
    add(
        "--policy",
        required=True,
        metavar="POLICY",
        help=(
            "no_speculation, prompt_lookup, static_eagle3, online_eagle3, ngram_table, online_draft_model, portfolio"
        ),
    )
    add("--costs", type=Path, required=True, metavar="FILE", help="step costs: a file that `aurora bench --json` wrote")
    add("--split", default="train", help="split of a `datasets` name (default: %(default)s)")
    add("--variant", help="only rows of this variant")
    add("--limit", type=int, metavar="N", help="the first N requests")
    add("--drafter", type=Path, metavar="DIR", help="published drafter to begin with; default: the untrained one")
    add("--draft-vocab", type=int, default=8192, metavar="N", help="of the untrained drafter (default: %(default)s)")
    add("--draft-layers", type=int, default=2, metavar="N", help="of the draft model (default: %(default)s)")
    drafters = ("eagle3", "ngram")
    add(
        "--drafters",
        type=names,
        default=drafters,
        metavar="NAME,NAME",
        help="of the portfolio (default: eagle3,ngram)",
    )
    add("--concurrency", type=int, default=4, metavar="N", help="requests at once (default: %(default)s)")
    add("--k-max", type=int, default=4, metavar="N", help="longest draft (default: %(default)s)")
    add("--fixed-k", type=int, metavar="N", help="the same k for all instead of choosing by goodput")
    add(
        "--train-share",
        type=float,
        default=0.15,
        metavar="S",
        help=("core-seconds of training in a modelled second (default: %(default)s)"),
    )
    add(
        "--sample-drafts",
        default="greedy",
        choices=("greedy", "probabilistic"),
        help="how the neural drafter drafts where the texts were sampled (default: %(default)s)",
    )
    add(
        "--codec",
        default="compact",
        metavar="NAME",
        help="form of the states that training gets: bf16, int8, compact or tiny (default: %(default)s)",
    )
    add("--results", type=Path, metavar="FILE", help="put rows of results there")
    add("--experiment", default="replay", metavar="NAME", help="of these rows (default: %(default)s)")
    add("--profile", type=Path, metavar="FILE", help="write there what `aurora simulate` needs to know of the drafter")
    add("--save-drafter", type=Path, metavar="DIR", help="keep the drafter that training ended with")
    add(
        "--domains",
        default="labels",
        metavar="HOW",
        help="what sorts requests: labels (the data set's), clusters (of their prompts) or none (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of training (default: %(default)s)")
    add("--seeds", type=int, default=1, metavar="N", help="replay with N seeds and give confidence intervals")
    _add_trainer_settings(add)
    add("--json", dest="json_file", type=Path, metavar="FILE", help="write every request's outcome there too")


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora train`; names and defaults are those of `TrainOptions`, which checks the values."""
    add = parser.add_argument
    add("log", type=Path, metavar="LOG", help="directory of traces (capture.log_dir) or that `aurora record` made")
    add("--out", type=Path, metavar="DIR", help="new directory for the drafter; not with --seeds, which only measure")
    add("--model", help="target; default: the one whose traces LOG holds")
    add("--drafter", type=Path, metavar="DIR", help="published drafter to begin with; default: the untrained one")
    add("--draft-vocab", type=int, default=8192, metavar="N", help="of the untrained drafter (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="optimiser steps; default: 8 passes over LOG")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--seeds", type=int, default=1, metavar="N", help="train with N seeds and give a confidence interval")
    add("--results", type=Path, metavar="FILE", help="put rows of results there")
    add("--experiment", default="train", metavar="NAME", help="of these rows (default: %(default)s)")
    add("--cell", default="", metavar="NAME", help="of these rows; default: LOG's name")
    _add_trainer_settings(add)


def add_curve_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora curves`; names and defaults are those of `CurveOptions`, which checks the values."""
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="RESULT", help="files that `aurora replay --json` wrote")
    add("--out", type=Path, required=True, metavar="FILE", help="picture to write, .png")
    add("--window", type=int, default=25, metavar="N", help="requests that a point is the mean of (default: 25)")
    add("--title", default="", metavar="TEXT", help="above the picture")


def add_simulate_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora simulate`; names and defaults are those of `SimulateOptions`, which checks the values."""
    add = parser.add_argument
    _add_trace_options(add)
    add("--costs", type=Path, required=True, metavar="FILE", help="step costs: a file that `aurora bench --json` wrote")
    add("--replicas", type=int, default=1, metavar="N", help="each batches by itself (default: %(default)s)")
    add("--at-once", type=int, default=0, metavar="N", help="keep N requests open, whenever the trace has them come")
    add("--results", type=Path, metavar="FILE", help="put rows of results there")
    add("--experiment", default="simulate", metavar="NAME", help="of these rows (default: %(default)s)")
    add("--cell", default="", metavar="NAME", help="of these rows; default: the trace's name")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora plan`; names and defaults are those of `PlanOptions`, which checks the values."""
    add = parser.add_argument
    _add_trace_options(add, required=False)
    add(
        "--machine",
        dest="machines",
        action="append",
        default=[],
        metavar="NAME=COSTS,PRICE[,KV_TOKENS]",
        help="a type of machine: step costs (a file that `aurora bench --json` wrote), price an hour; repeatable",
    )
    add("--first-token-s", type=float, metavar="S", help="promised: time to the first token")
    add("--token-ms", type=float, metavar="MS", help="promised: time a further token, as a mean over the answer")
    add("--attain", type=float, default=0.99, metavar="SHARE", help="of requests served so (default: %(default)s)")
    add("--max-replicas", type=int, default=64, metavar="N", help="default: %(default)s")
    add(
        "--training-slowdown",
        type=float,
        default=0.15,
        metavar="F",
        help="how much longer steps take beside a trainer that never rests (default: %(default)s; 0: its own machine)",
    )
    _add_placement_options(parser.add_argument_group("placement, without TRACE").add_argument)


def _add_placement_options(add: Callable[..., object]) -> None:
    """The flags of `aurora plan --placement`; names and defaults are those of `PlaceOptions`."""
    add("--placement", action="store_true", help="say where replicas and trainer would go on the nodes, and why")
    add("--model", default=DEFAULT_MODEL, metavar="MODEL", help="target (default: %(default)s)")
    add(
        "--node",
        dest="nodes",
        action="append",
        default=[],
        metavar="NAME=CPUS[,GPUS,GPU_GIB][,serve|,train]",
        help="a node of the cluster; repeatable",
    )
    add("--address", metavar="HOST:PORT", help="take the nodes of this Ray cluster, or of the local one (auto)")
    add("--gpu-gib", type=float, metavar="N", help="memory of a GPU whose type Ray does not tell")
    add("--replicas", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of a replica (default: %(default)s)")
    add("--room-tokens", type=int, default=16384, metavar="N", help="least room of a KV cache (default: %(default)s)")
    add("--server-cpus", type=int, default=1, metavar="N", help="least CPUs of a replica (default: %(default)s)")
    add("--trainer-cpus", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--trainer", default="auto", metavar="PLACE", help="auto, gpu, shared, cpu or none (default: %(default)s)")


def _add_trace_options(add: Callable[..., object], required: bool = True) -> None:
    """What `aurora simulate` and `aurora plan` have in common (`TraceOptions`)."""
    arrivals = "arrivals: .jsonl or .csv with time, prompt and output tokens"
    add("trace", type=Path, nargs=None if required else "?", metavar="TRACE", help=arrivals)
    add(
        "--profile",
        type=Path,
        required=required,
        metavar="FILE",
        help="drafts: a file that `aurora replay --profile` wrote",
    )
    add(
        "--columns",
        type=names,
        default=(),
        metavar="WHAT=NAME,...",
        help="names of the columns time, prompt, output, ...",
    )
    add("--requests", type=int, metavar="N", help="the first N; a shorter trace is repeated (default: the trace)")
    add("--speed", type=float, default=1.0, metavar="F", help="requests come F times faster (default: %(default)s)")
    add("--max-seqs", type=int, default=256, metavar="N", help="requests in a batch (default: %(default)s)")
    add("--token-budget", type=int, default=2048, metavar="N", help="tokens of a step (default: %(default)s)")
    add("--kv-tokens", type=int, default=1 << 20, metavar="N", help="that the KV cache holds (default: %(default)s)")
    add("--router", default="round_robin", metavar="POLICY", help="round_robin, least_loaded or earliest_finish")
    add(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="read every prompt whole, though the trace has hashes of blocks or sessions",
    )
    add("--exploration", type=float, default=0.01, metavar="S", help="share of the steps (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of who gets which answer (default: %(default)s)")
    add("--json", dest="json_file", type=Path, metavar="FILE", help="write the numbers there too")


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    """`1:4,8:1` as ((1, 4), (8, 1))."""
    try:
        return tuple((int(n), int(k)) for n, _, k in (part.partition(":") for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: give N:K,N:K with whole numbers, such as 1:4,8:1") from error


def _named_url(text: str) -> tuple[str, str]:
    """`name=http://host:port/v1` as (name, http://host:port)."""
    name, _, url = text.partition("=")
    if not name or not url:
        raise argparse.ArgumentTypeError(f"{text}: give NAME=URL, such as plain=http://127.0.0.1:8000")
    return name, url.rstrip("/").removesuffix("/v1")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `aurora report`; names and defaults are those of `ReportOptions`, which checks the values."""
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="RUN", help="files that `aurora bench --json` or `traffic --json` wrote")
    add("--html", type=Path, metavar="OUT", help="write a report there, too: one page that needs nothing else")


def _loads(text: str) -> tuple[tuple[int, float], ...]:
    """`1,4@0.7` as requests at once and their temperature."""
    try:
        return tuple((int(n), float(t or 0)) for n, _, t in (part.partition("@") for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: give N,N@T with whole numbers N, such as 1,4@0.7") from error
