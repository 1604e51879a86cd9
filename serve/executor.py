"""vLLM's worker inside the engine process (seam: `--distributed-executor-backend`, vLLM 0.32-0.33, CPU).

With vLLM's own choice on a CPU the engine and its one worker are two processes that wait for each other by polling: one
core is always busy with it, which a machine of few cores feels in every step. vLLM's reason for two is that OpenMP must
be set up before a process begins; `openmp_environment` does that for the engine process as a whole.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class InProcessExecutor(UniProcExecutor):
    """vLLM's executor for one worker, under a name that its CPU platform does not replace."""


def prefer_in_process(args: Namespace) -> None:
    """Choose it for an engine of one worker whose user has not chosen an executor."""
    workers = args.tensor_parallel_size * args.pipeline_parallel_size * args.data_parallel_size
    if args.distributed_executor_backend is None and workers == 1:
        args.distributed_executor_backend = f"{__name__}.{InProcessExecutor.__name__}"


@contextmanager
def openmp_environment(config: Any) -> Iterator[None]:
    """Processes that begin inside have OpenMP set up as vLLM does for the worker of `config` (a `VllmConfig`)."""
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    if config.parallel_config.distributed_executor_backend != f"{__name__}.{InProcessExecutor.__name__}":
        yield
        return
    with OMPProcessManager(config).configure_omp_envs(0, 0):
        yield
