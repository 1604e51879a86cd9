"""The engine without HTTP and without actors: for commands that work through a list of requests by themselves."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from aurora.config import AuroraConfig
from aurora.environment import engine_environment
from aurora.metrics import EngineReport
from aurora.trace import DraftTrace, decode_traces
from serve.engine import install_seams, start_engine


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled. top_k 0: unlimited; seed None: not reproducible."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int | None


class OfflineEngine:
    """vLLM with Aurora's seams. `start` comes first, `close` last."""

    def __init__(self, config: AuroraConfig, model_dir: Path) -> None:
        """Blocks for about a minute. Raises UserError for what the user can mend."""
        from transformers import AutoTokenizer

        os.environ.update(engine_environment())  # the engine's processes are spawned from here on
        self._config = config
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._engine = start_engine(config, model_dir)

    async def start(self) -> None:
        """Put capture and the other seams in place; call it in the event loop that serves."""
        await install_seams(self._engine, self._config)

    async def chat(self, request_id: str, messages: Sequence[dict[str, str]], sampling: Sampling) -> str:
        """Answer one chat request. vLLM appends a suffix to `request_id` in the traces."""
        from vllm import SamplingParams

        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
        )
        answer = ""
        async for output in self._engine.client.generate({"prompt_token_ids": ids}, params, request_id=request_id):
            answer = output.outputs[0].text
        return answer

    async def drain(self) -> list[DraftTrace]:
        """All traces since the last call."""
        traces, waiting = list[DraftTrace](), True
        while waiting:
            ((payload, encoded),) = await self._engine.client.collective_rpc("aurora_drain")
            traces += decode_traces(payload) if payload else []
            waiting = msgspec.msgpack.decode(encoded, type=EngineReport).traces_waiting > 0
        return traces

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.client.shutdown()
        # vLLM's finaliser shuts down once more, which fails with a traceback when it runs as the interpreter ends.
        self._engine.client.shutdown = lambda: None
