"""The places of vLLM that Aurora builds on: each fails here, by name, when vLLM moves it."""

import inspect

import numpy as np
import pytest
import torch

from serve import sampling_shim
from serve.worker import _RUNNER_SEAMS


def test_the_model_runner_has_the_wrapped_methods() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for name in _RUNNER_SEAMS:
        assert callable(getattr(GPUModelRunner, name, None)), f"GPUModelRunner.{name} is gone (serve/worker.py)"


def test_the_runners_state_carries_what_capture_reads() -> None:
    from vllm.v1.worker.gpu_model_runner import ExecuteModelState, GPUModelRunner

    assert "self.requests:" in inspect.getsource(GPUModelRunner.__init__), "serve/capture.py forgets domains by it"
    needed = {"scheduler_output", "spec_decode_metadata", "hidden_states", "aux_hidden_states"}
    assert needed <= set(ExecuteModelState._fields), "serve/capture.py reads these"


def test_the_scheduler_has_the_overridden_methods() -> None:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

    expected = {
        "schedule": ["self", "throttle_prefills"],
        "update_from_output": ["self", "scheduler_output", "model_runner_output"],
        "update_draft_token_ids": ["self", "draft_token_ids"],
    }
    for name, arguments in expected.items():
        found = list(inspect.signature(getattr(Scheduler, name)).parameters)
        assert found == arguments, f"Scheduler.{name} has changed (serve/scheduler.py)"
    fields = set(SchedulerOutput.__dataclass_fields__)
    assert {"num_spec_tokens_to_schedule", "scheduled_spec_decode_tokens", "num_scheduled_tokens"} <= fields


def test_what_comes_from_the_engine_can_carry_notes_and_be_seen() -> None:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor

    assert {"request_id", "new_token_ids", "kv_transfer_params"} <= set(EngineCoreOutput.__struct_fields__)
    assert not EngineCoreOutput.__struct_config__.frozen, "serve/token_sources.py puts notes on it"
    assert isinstance(AsyncLLM.tokenizer, property), "serve/source_answers.py reads it"
    found = list(inspect.signature(OutputProcessor.process_outputs).parameters)
    assert found[:2] == ["self", "engine_core_outputs"], "serve/token_sources.py takes them off"


def test_the_app_can_be_hosted() -> None:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    assert list(inspect.signature(build_app).parameters)[:3] == ["args", "supported_tasks", "model_config"]
    assert list(inspect.signature(init_app_state).parameters)[:3] == ["engine_client", "state", "args"]


def test_the_worker_can_live_in_the_engine_process() -> None:
    from argparse import Namespace

    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.executor.abstract import Executor

    from serve.executor import InProcessExecutor, prefer_in_process

    one = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    args = Namespace(distributed_executor_backend=None, **one)
    prefer_in_process(args)
    assert resolve_obj_by_qualname(args.distributed_executor_backend) is InProcessExecutor
    assert issubclass(InProcessExecutor, Executor)
    assert list(inspect.signature(OMPProcessManager.configure_omp_envs).parameters) == ["self", "rank", "local_rank"]
    for other in ({"tensor_parallel_size": 2}, {"distributed_executor_backend": "mp"}):
        args = Namespace(**{"distributed_executor_backend": None, **one, **other})
        prefer_in_process(args)
        assert args.distributed_executor_backend == other.get("distributed_executor_backend"), "the user's, or vLLM's"


def test_the_sampling_repair_replaces_a_function_of_the_same_signature() -> None:
    from vllm.v1.sample import rejection_sampler

    theirs = inspect.signature(rejection_sampler.expand_batch_to_tokens)
    assert list(inspect.signature(sampling_shim.expand_batch_to_tokens).parameters) == list(theirs.parameters)


def test_the_sampling_repair_expands_floats_and_integers() -> None:
    bounds = torch.tensor([2, 2, 5])
    expand = sampling_shim.expand_batch_to_tokens
    assert torch.equal(expand(torch.tensor([0.7, 1.0, 0.0]), bounds, 5), torch.tensor([0.7, 0.7, 0, 0, 0]))
    assert torch.equal(expand(torch.tensor([0.7, 1.0, 0.0]), bounds, 5, 0, 1), torch.tensor([0.7, 0.7, 1, 1, 1]))
    assert torch.equal(expand(torch.tensor([5, 6, 7]), bounds, 5), torch.tensor([5, 5, 7, 7, 7]))


def test_a_seeded_request_keeps_its_generator_out_of_steps_whose_token_is_thrown_away() -> None:
    from types import SimpleNamespace

    generators = {i: torch.Generator().manual_seed(i) for i in range(3)}
    mask = SimpleNamespace(np=np.array([True, False, True, True]))
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(num_reqs=3, generators=dict(generators)), discard_request_mask=mask
    )
    with sampling_shim.unseeded(runner):
        assert runner.input_batch.generators == {1: generators[1]}
    assert runner.input_batch.generators == generators


def test_the_runner_says_whose_token_is_thrown_away() -> None:
    from vllm.v1.worker import gpu_input_batch, gpu_model_runner

    assert "self.discard_request_mask.np[:num_reqs]" in inspect.getsource(gpu_model_runner), "serve/sampling_shim.py"
    assert "generators=self.generators" in inspect.getsource(gpu_input_batch), "serve/sampling_shim.py"


def test_a_runner_without_the_seams_is_refused() -> None:
    from serve.worker import AuroraWorker

    worker = AuroraWorker()
    worker.model_runner = object()
    with pytest.raises(RuntimeError, match=r"lacks sample_tokens.*VLLM_USE_V2_MODEL_RUNNER=0"):
        worker.aurora_install({})
