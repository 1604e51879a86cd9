"""What a user can get wrong at start-up: one line that names it, an exit code, nothing half-written."""

import json
import socket
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from aurora.config import UserError
from aurora.options import refuse_misspelt
from serve.engine import parse_vllm_args
from tests.integration.process import START_LIMIT_S, ServedModel
from tests.waiting import wait_until

pytestmark = pytest.mark.engine


def _error(code: int, output: str) -> str:
    assert code == 2, output[-2000:]
    lines = [line for line in output.splitlines() if line.startswith("aurora: error:")]
    assert len(lines) == 1, output[-2000:]
    return lines[0]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def test_unknown_flags_are_refused_by_name(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="--no-such-flag"):
        parse_vllm_args(str(tiny_model), ("--no-such-flag", "3"))
    with pytest.raises(UserError, match="max-model-len"):
        parse_vllm_args(str(tiny_model), ("--max-model-len", "many"))


def test_no_flag_of_vllms_is_taken_for_a_misspelt_one_of_ours() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    actions = make_arg_parser(FlexibleArgumentParser())._actions
    theirs = {flag for action in actions for flag in action.option_strings if flag.startswith("--")}
    assert len(theirs) > 200
    for flag in theirs:
        refuse_misspelt([flag])


def test_a_stop_while_it_starts(tiny_model: Path, tmp_path: Path) -> None:
    server = ServedModel(tiny_model, tmp_path / "run", "--no-speculation")

    def engine_begins() -> bool:
        assert server.process.poll() is None, server.output()
        return any("spawn_main" in line or "EngineCore" in line for line in map(_command, server.processes()))

    wait_until(engine_begins, START_LIMIT_S, "the engine's process, which imports vLLM for seconds before it is ready")
    assert server.stop() == 0
    assert "answers at" not in server.output()


def test_a_port_in_use(tiny_model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = _error(*ServedModel(tiny_model, tmp_path / "run", f"--port={port}", "--no-learning").wait_end())
    assert str(port) in message
    assert "--port" in message


def test_no_memory_for_the_kv_cache(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--no-learning", "--draft-vocab=256", "--kv-cache-memory-bytes=500000", "--max-model-len=1024")
    message = _error(*ServedModel(tiny_model, tmp_path / "run", *flags).wait_end())
    assert "KV cache" in message
    assert "--max-model-len" in message


def test_a_drafter_of_another_model(learning: ServedModel, tiny_model: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    source = max((learning.run_dir / "drafters").glob("v*"))
    config = json.loads((source / "config.json").read_text())
    config["transformer_layer_config"]["hidden_size"] = 128
    (foreign / "config.json").write_text(json.dumps(config))
    save_file(load_file(source / "model.safetensors"), foreign / "model.safetensors")
    run_dir = tmp_path / "run"
    message = _error(*ServedModel(tiny_model, run_dir, "--no-learning", f"--drafter={foreign}").wait_end())
    assert "hidden_size" in message
    assert not list((run_dir / "drafters").glob("v*"))
