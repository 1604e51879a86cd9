"""The flags of `aurora serve`: a table from flag to configuration key, and the split between our flags and vLLM's.

A flag that is not in the table belongs to vLLM, which checks it by name at start-up. Flags of vLLM that Aurora itself
sets are refused here, and so are those that are nearly one of the table.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aurora.config import AuroraConfig


@dataclass(frozen=True)
class Option:
    """One flag. `constant` is what a flag without a value sets."""

    flag: str
    key: str
    help: str
    kind: Callable[[str], Any] = str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    constant: bool | None = None

    @property
    def dest(self) -> str:
        return "option_" + self.flag.lstrip("-").replace("-", "_")


def names(text: str) -> tuple[str, ...]:
    """`a,b` as ("a", "b")."""
    return tuple(text.split(","))


OPTIONS = (
    Option("--host", "server.host", "address to listen on"),
    Option("--port", "server.port", "port to listen on; 0 takes a free one", int, "N"),
    Option("--api-key-file", "server.api_key_file", "file with one API key a line", Path, "FILE"),
    Option("--insecure", "server.insecure", "listen beyond this machine without an API key", constant=True),
    Option("--run-dir", "run_dir", "drafter store, checkpoints and W&B files", Path, "DIR"),
    Option("--no-speculation", "speculation.enabled", "decode plainly", constant=False),
    Option("--fixed-k", "speculation.fixed_k", "draft N tokens for every request instead of choosing", int, "N"),
    Option("--k-max", "speculation.k_max", "longest draft", int, "N"),
    Option("--objective", "speculation.objective", "what drafts are for", choices=("goodput", "latency", "slo")),
    Option("--token-deadline-ms", "speculation.token_deadline_ms", "time a token may take (slo)", float, "MS"),
    Option("--drafters", "speculation.drafters", "what may draft, of eagle3, ngram, model", names, "NAME,NAME"),
    Option("--no-learning", "trainer.enabled", "serve without a trainer", constant=False),
    Option("--drafter", "speculation.drafter", "drafter to start from; default: made from the target", Path, "DIR"),
    Option("--draft-vocab", "speculation.draft_vocab", "tokens that the drafter can propose", int, "N"),
    Option(
        "--sample-drafts", "speculation.sample_drafts", "how tokens are drafted", choices=("greedy", "probabilistic")
    ),
    Option("--trainer-threads", "trainer.threads", "CPU threads of the trainer", int, "N"),
    Option("--publish-interval", "trainer.publish_interval_s", "time between candidate drafters", float, "S"),
    Option("--wandb", "reporter.mode", "W&B mode", choices=("offline", "online", "disabled")),
    Option("--reporter-sink", "reporter.sink", "where to report", choices=("wandb", "tensorboard", "jsonl")),
    Option("--wandb-project", "reporter.project", "W&B project", metavar="NAME"),
    Option("--replicas", "cluster.replicas", "servers behind the endpoint, each with an engine of its own", int, "N"),
    Option(
        "--router",
        "cluster.router",
        "which replica answers a request",
        choices=("round_robin", "least_loaded", "earliest_finish"),
    ),
    Option("--address", "cluster.address", "Ray cluster to join: auto or HOST:PORT; default: a local one"),
)

_MISSPELT = 0.8  # likeness (`difflib`) of a flag to one of ours from which on it is taken for that; vLLM's are below it
_SPECULATION = "Aurora sets it; use --k-max, --fixed-k, --drafter, --sample-drafts or --no-speculation"
_ENGINE_SEAM = "Aurora installs its own there"
REFUSED = {
    "--speculative-config": _SPECULATION,
    "-sc": _SPECULATION,
    "--spec-method": _SPECULATION,
    "--spec-model": _SPECULATION,
    "--spec-tokens": _SPECULATION,
    "--scheduler-cls": _ENGINE_SEAM,
    "--worker-cls": _ENGINE_SEAM,
    "--worker-extension-cls": _ENGINE_SEAM,
    "--async-scheduling": "Aurora chooses k on the synchronous path; leave it out",
    "--no-async-scheduling": "it is off already; leave it out",
    "--api-key": "give --api-key-file FILE or set AURORA_API_KEY: a command line is visible to all users",
    "--model": "give the model as the first argument: aurora serve MODEL",
}


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add --config, --set and every flag of the table."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file; flags override it")
    for option in OPTIONS:
        arguments: dict[str, Any] = {"dest": option.dest, "help": option.help, "default": None}
        if option.constant is not None:
            arguments |= {"action": "store_const", "const": option.constant}
        else:
            metavar = option.metavar or (None if option.choices else option.flag.lstrip("-").upper())
            arguments |= {"type": option.kind, "metavar": metavar, "choices": option.choices}
        parser.add_argument(option.flag, **arguments)
    help_set = "any configuration key, for example --set capture.sink_mib=64; see `aurora config show`"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help=help_set)


def read_config(known: argparse.Namespace, rest: Sequence[str]) -> "AuroraConfig":
    """The configuration of a parsed command line; `rest` is what the table does not know: MODEL and vLLM's flags.

    Raises ConfigError.
    """
    from aurora.config import load_config

    model, vllm_args = split_model(rest)
    overrides: dict[str, Any] = {"model": model, "vllm_args": vllm_args or None}
    overrides |= {option.key: getattr(known, option.dest) for option in OPTIONS}
    overrides |= dict(_parse_setting(setting) for setting in known.settings)
    config = load_config(known.config, overrides)
    refuse_controlled(config.vllm_args, config.speculation.enabled)
    refuse_misspelt(config.vllm_args)
    return config


def split_model(rest: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
    """MODEL, which comes before every flag of vLLM's, and those flags; `--` ends our flags and is dropped.

    Raises ConfigError for a second MODEL.
    """
    from aurora.config import ConfigError

    model = None
    if rest and not rest[0].startswith("-"):
        model, *rest = rest
    if rest and not rest[0].startswith("-"):
        raise ConfigError(f"{rest[0]}: the model is {model} already; give one MODEL, then flags")
    return model, tuple(argument for argument in rest if argument != "--")


def refuse_controlled(vllm_args: Sequence[str], speculation: bool = True) -> None:
    """Raise ConfigError for a flag of vLLM's that Aurora sets itself, however it is spelt.

    Without `speculation` of Aurora's own the user may have vLLM's.
    """
    from aurora.config import ConfigError

    for argument in vllm_args:
        flag = argument.split("=", 1)[0].split(".", 1)[0]
        name = flag.replace("_", "-") if flag.startswith("--") else flag
        if name in REFUSED and (speculation or REFUSED[name] != _SPECULATION):
            raise ConfigError(f"{flag}: {REFUSED[name]}")


def refuse_misspelt(vllm_args: Sequence[str]) -> None:
    """Raise ConfigError for a flag that is nearly one of ours: vLLM, which has none so alike, would refuse it late."""
    from aurora.config import ConfigError

    ours = ["--config", "--set", *(option.flag for option in OPTIONS)]
    for argument in vllm_args:
        flag = argument.split("=", 1)[0]
        near = get_close_matches(flag, ours, 1, _MISSPELT) if flag.startswith("--") else []
        if near and near[0] != flag:
            raise ConfigError(f"{flag}: no such flag; did you mean {near[0]}?")


def _parse_setting(setting: str) -> tuple[str, Any]:
    """Key and value of a `--set`. Raises ConfigError."""
    import yaml

    from aurora.config import ConfigError

    key, equals, text = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {setting}: expected KEY=VALUE, for example --set trainer.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting}: the value is not YAML; quote it") from error
    return key, value


def trainer_settings(settings: Sequence[str]) -> dict[str, Any]:
    """The overrides of `--set trainer.KEY=VALUE` flags. Raises ConfigError for another part of the configuration."""
    from aurora.config import ConfigError

    overrides = dict(_parse_setting(setting) for setting in settings)
    for key in overrides:
        if not key.startswith("trainer."):
            raise ConfigError(f"--set {key}: only keys of the trainer can be set here, for example trainer.loss")
    return overrides
