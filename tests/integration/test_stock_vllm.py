"""A published drafter directory is an ordinary drafter: stock `vllm serve` loads it and accepts its drafts."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from aurora.environment import engine_environment
from aurora.store import DrafterStore
from tests.integration.process import START_LIMIT_S, ServedModel, end, random_prompts
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
VLLM = Path(__file__).with_name("vllm_command.py")


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def test_stock_vllm_serves_a_published_drafter(learning: ServedModel, tiny_model: Path, tmp_path: Path) -> None:
    learning.serve_until_version(int(learning.metric("aurora_drafter_version")) + 2)
    store = DrafterStore(learning.run_dir / "drafters")
    newest = store.latest()
    assert newest is not None
    drafter = tmp_path / "drafter"
    with store.held(newest):  # learning goes on, and old versions go while vLLM starts
        shutil.copytree(store.read(newest).path, drafter)
    speculation = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": 3}
    url = "http://127.0.0.1:18765"
    command = [sys.executable, VLLM, "serve", tiny_model, "--port=18765", "--host=127.0.0.1"]
    flags = [
        "--enforce-eager",
        "--dtype=float32",
        "--kv-cache-memory-bytes=500M",
        "--max-model-len=512",
        f"--speculative-config={json.dumps(speculation)}",
    ]
    log = tmp_path / "vllm.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *flags], stdout=out, stderr=out, env={**os.environ, **engine_environment()}
        )
    try:
        _wait(url, process, log)
        familiar = [prompt for seed in range(100, 104) for prompt in random_prompts(16, seed)]  # it learned from these
        body = {"model": str(tiny_model), "prompt": familiar, "max_tokens": 32, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps({**body, "temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            assert json.loads(answer.read())["usage"]["completion_tokens"] == 32 * len(familiar)
        accepted = re.findall(r"^vllm:spec_decode_num_accepted_tokens_total\S* (\S+)$", _get(f"{url}/metrics"), re.M)
        assert sum(map(float, accepted)) > 0
    finally:
        end(process.pid)


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            _get(f"{url}/health")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    wait_until(answers, START_LIMIT_S, f"stock vLLM does not answer; see {log}")
