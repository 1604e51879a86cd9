"""Builds vLLM's asynchronous engine with Aurora's seams in place."""

import os
import re
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from aurora.config import AuroraConfig, UserError
from aurora.environment import available_memory, kv_cache_bytes
from aurora.store import DrafterRefused, DrafterStore, DrafterVersion
from drafters import TargetWeights, ensure_draft_model, ensure_drafter
from serve.calibration import costs_file, known_costs
from serve.plugin import ENGINE_ENV

_SCHEDULER = "serve.scheduler.AuroraScheduler"
_WORKER_EXTENSION = "serve.worker.AuroraWorker"


@dataclass(frozen=True)
class RunningEngine:
    """A started engine and what it was started with."""

    client: Any  # vllm.v1.engine.async_llm.AsyncLLM
    args: Namespace  # vLLM's serve arguments
    drafter: DrafterVersion | None  # None without speculation
    draft_model: DrafterVersion | None = None  # None where no draft model drafts
    uncalibrated: bool = False  # whether its step costs are to be measured


def parse_vllm_args(model: str, flags: tuple[str, ...]) -> Namespace:
    """vLLM's own `serve` arguments. Raises UserError naming the flag or the value that vLLM refuses."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="aurora serve"))

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; `aurora serve --help` lists Aurora's flags, `vllm serve --help=all` vLLM's")

    parser.error = refuse
    try:
        args: Namespace = parser.parse_args([model, *flags])
        args.model = model
        validate_parsed_serve_args(args)
    except (ValueError, TypeError) as error:
        raise error if isinstance(error, UserError) else UserError(f"vLLM refuses its flags: {error}") from error
    return args


def start_engine(config: AuroraConfig, model_dir: Path, newest: Mapping[str, int] | None = None) -> RunningEngine:
    """Start vLLM on a local model directory. Blocks for about a minute. Raises UserError for what a user can mend.

    newest: by kind (`eagle3`, `model`), the newest version that may draft; without an entry any may.
    """
    with ExitStack() as stack:
        return _start_engine(config, model_dir, newest or {}, stack)


def _start_engine(
    config: AuroraConfig, model_dir: Path, newest: Mapping[str, int], reading: ExitStack
) -> RunningEngine:
    """`reading` keeps the drafter that vLLM reads from being pruned meanwhile."""
    os.environ[ENGINE_ENV] = str(os.getpid())
    args = parse_vllm_args(str(model_dir), config.vllm_args)
    args.served_model_name = args.served_model_name or [config.model]
    _set_defaults(args, config.vllm_args)
    drafter = _first_drafter(config, model_dir, newest.get("eagle3"), reading) if config.speculation.enabled else None
    draft_model = _first_draft_model(config, model_dir, newest.get("model"))
    uncalibrated = False
    if drafter is not None:
        costs = costs_file(config, model_dir, drafter)
        uncalibrated = _wants_calibration(config) and known_costs(costs) is None
        _speculate(args, config, drafter, costs)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from serve.executor import openmp_environment

    try:
        engine_config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        _refuse_parallel(engine_config)
        with openmp_environment(engine_config):
            client = AsyncLLM.from_vllm_config(engine_config, disable_log_stats=args.disable_log_stats)
    except UserError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"the engine did not start: {_cause(error)}") from error
    return RunningEngine(client, args, drafter, draft_model, uncalibrated)


async def install_seams(engine: RunningEngine, config: AuroraConfig) -> None:
    """Put capture, swap and the sampling repair into every worker; an engine without them must not serve."""
    assert engine.drafter is not None, "nothing to install without speculation"
    settings = {
        "sink_bytes": config.capture.sink_mib << 20 if config.captures else 0,
        "prompt_tokens": config.capture.prompt_tokens,
        "top_m": config.capture.top_m,
        "codec": config.capture.codec,
        "store_dir": str(config.store_dir.resolve()),
        "version": engine.drafter.number,
        "gated_rates": [float(r) for r in engine.drafter.metadata.get("gated_rates") or []],
        "draft_model": _draft_model_settings(engine, config),
    }
    found = await engine.client.collective_rpc("aurora_install", args=(settings,))
    if not found:
        raise RuntimeError("no worker installed Aurora's hooks: capture would be silently absent")


def _first_drafter(config: AuroraConfig, model_dir: Path, newest: int | None, reading: ExitStack) -> DrafterVersion:
    """The newest published drafter, or a new one. Raises UserError for one that this target cannot use."""
    store = DrafterStore(config.store_dir, newest)
    while True:
        try:
            version = ensure_drafter(store, model_dir, config.speculation, config.trainer.seed)
        except ValueError as error:
            raise UserError(str(error)) from error
        with suppress(DrafterRefused):  # pruned since; another one is there
            reading.enter_context(store.held(version.number))
            return version


def _first_draft_model(config: AuroraConfig, model_dir: Path, newest: int | None) -> DrafterVersion | None:
    """The same for the draft model; None where none is asked for."""
    if not config.speculation.enabled or "model" not in config.speculation.drafters:
        return None
    try:
        target = TargetWeights.load(model_dir)
        return ensure_draft_model(DrafterStore(config.draft_model_dir, newest), target, config.speculation)
    except ValueError as error:
        raise UserError(str(error)) from error


def _draft_model_settings(engine: RunningEngine, config: AuroraConfig) -> dict[str, Any] | None:
    if engine.draft_model is None:
        return None
    return {"store_dir": str(config.draft_model_dir.resolve()), "version": engine.draft_model.number}


def _set_defaults(args: Namespace, flags: tuple[str, ...]) -> None:
    """On a CPU: eager and fp32 unless the user says otherwise (compilation adds two minutes to the start)."""
    from vllm.platforms import current_platform

    from serve.executor import prefer_in_process

    given = {flag.split("=")[0] for flag in flags}
    if current_platform.is_cpu():
        args.enforce_eager = args.enforce_eager or "--compilation-config" not in given
        args.dtype = args.dtype if "--dtype" in given else "float32"
        args.max_num_seqs = args.max_num_seqs or 64
        args.kv_cache_memory_bytes = args.kv_cache_memory_bytes or kv_cache_bytes(available_memory())
        prefer_in_process(args)
    args.enable_log_requests = False


def _wants_calibration(config: AuroraConfig) -> bool:
    return config.speculation.calibrate and config.speculation.fixed_k is None


def _speculate(args: Namespace, config: AuroraConfig, drafter: DrafterVersion, costs: Path) -> None:
    speculation = config.speculation
    args.scheduler_cls = _SCHEDULER
    args.worker_extension_cls = _WORKER_EXTENSION
    args.async_scheduling = False
    args.speculative_config = {
        "method": "eagle3",
        "model": str(drafter.path.resolve()),
        "num_speculative_tokens": speculation.k_max,
        "draft_sample_method": speculation.sample_drafts,
        # Without it each prompt reads a block (128 tokens on a CPU) of its cached prefix anew, for the sake of one
        # position at which the drafter saw another next token.
        "disable_eagle_block_drop": True,
    }
    args.additional_config = {
        **(args.additional_config or {}),
        "aurora": speculation.model_dump(mode="json"),
        "aurora_step_costs": str(costs),
    }


def _refuse_parallel(engine_config: Any) -> None:
    parallel = engine_config.parallel_config
    if engine_config.speculative_config is not None and parallel.world_size > 1:
        raise UserError(
            f"--tensor-parallel-size x --pipeline-parallel-size = {parallel.world_size}: capture and swap work on "
            "one worker so far; leave both at 1, or serve with --no-speculation"
        )


def _cause(error: Exception) -> str:
    """The root cause in one line; vLLM's engine process prints it on stderr and raises only 'see above' here."""
    text = str(error)
    if "root cause" in text.lower():
        log = Path("/proc/self/fd/2").readlink() if Path("/proc/self/fd/2").is_symlink() else None
        if log is not None and log.is_file():
            lines = log.read_text(errors="replace").splitlines()
            raised = [m[1] for m in (re.search(r"\b((?:\w+Error|torch\.\w+Error): .+)", line) for line in lines) if m]
            causes = [line for line in raised if "root cause" not in line]
            text = causes[-1] if causes else text
    text = " ".join(text.split()).rstrip(".")
    if "KV cache" in text or "memory" in text.lower():
        text += "; lower --max-model-len or --max-num-seqs, or give the cache more with --kv-cache-memory-bytes"
    return text
