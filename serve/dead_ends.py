"""Grammars that no text satisfies, or that leave none from some point on, are the client's error: 400, not 500.

vLLM 0.32 takes such a grammar (`{"$ref": "#"}`, `root ::= root root`) for valid. Its mask then admits no token, the
token that is sampled all the same is rejected, and the request ends with the reason `error`, which the HTTP layer
answers with 500. Where a constrained request ends so, the grammar is compiled here once more and led along the tokens
that were emitted (seam: `AsyncLLM.generate`, vLLM 0.32-0.33); requests that end well cost nothing.
"""

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.structured_output.backend_types import StructuredOutputBackend

_REFUSED = (
    "the grammar or schema admits no further text after {} tokens: no text satisfies it, or a rule in it never ends; "
    "give every rule an alternative that ends"
)


def install(client: Any) -> None:
    """Have the client (`AsyncLLM`) raise `VLLMValidationError` for such requests."""
    generate, judge = client.generate, _Judge(client)

    async def generate_or_refuse(
        prompt: Any, sampling_params: "SamplingParams", *args: Any, **kwargs: Any
    ) -> "AsyncGenerator[RequestOutput, None]":
        emitted: defaultdict[int, list[int]] = defaultdict(list)
        async for output in generate(prompt, sampling_params, *args, **kwargs):
            if sampling_params.structured_outputs is not None:
                await judge.look(output, sampling_params, emitted)
            yield output

    client.generate = generate_or_refuse


class _Judge:
    def __init__(self, client: Any) -> None:
        self._client = client
        self._backend: StructuredOutputBackend | None = None
        self._lock = threading.Lock()

    async def look(
        self, output: "RequestOutput", params: "SamplingParams", emitted: defaultdict[int, list[int]]
    ) -> None:
        """Note what was emitted. Raises VLLMValidationError for an answer that its grammar let end nowhere."""
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind

        for answer in output.outputs:
            tokens = emitted[answer.index]
            if params.output_kind != RequestOutputKind.DELTA:
                tokens.clear()
            tokens.extend(answer.token_ids)
            if answer.finish_reason == "error":
                end = await asyncio.to_thread(self._dead_end, params, tokens)
                if end is not None:
                    raise VLLMValidationError(_REFUSED.format(end), parameter="structured_outputs")

    def _dead_end(self, params: "SamplingParams", tokens: Sequence[int]) -> int | None:
        """After how many of the tokens the grammar admits none; None if it always does, or another backend judges."""
        from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
        from vllm.v1.structured_output.request import get_structured_output_key

        assert params.structured_outputs is not None
        if params.structured_outputs._backend != "xgrammar":
            return None
        config = self._client.vllm_config
        with self._lock:
            if self._backend is None:
                size = config.model_config.get_vocab_size()
                self._backend = XgrammarBackend(config, tokenizer=self._client.tokenizer, vocab_size=size)
            key = get_structured_output_key(params.structured_outputs)
            try:
                grammar = self._backend.compile_grammar(*key, stop_token_ids=params.all_stop_token_ids)
            except (RuntimeError, ValueError):  # of the compiler: it cannot take the grammar at all
                return 0
            accepted = 0
            while accepted < len(tokens) and grammar.validate_tokens([tokens[accepted]]):
                grammar.accept_tokens("", [tokens[accepted]])
                accepted += 1
            mask = self._backend.allocate_token_bitmask(1)
            grammar.fill_bitmask(mask, 0)
            return None if grammar.is_terminated() or bool(mask.any()) else accepted
