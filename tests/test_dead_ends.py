"""Grammars that no text satisfies: whose error it is, on xgrammar itself."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from serve import dead_ends
from tests.integration.tiny_model import VOCAB, new_tokenizer

TOKENIZER = new_tokenizer()


class Client:
    """Answers with what it is given; the rest is what xgrammar wants of a configuration."""

    def __init__(self, steps: list[tuple[list[int], str | None]]) -> None:
        model = SimpleNamespace(get_vocab_size=lambda: VOCAB, hf_config=SimpleNamespace(model_type="llama"))
        structured = SimpleNamespace(disable_any_whitespace=False)
        self.vllm_config = SimpleNamespace(
            model_config=model, structured_outputs_config=structured, speculative_config=None
        )
        self.tokenizer: PreTrainedTokenizerFast = TOKENIZER
        self.steps = steps

    async def generate(self, prompt: Any, sampling_params: SamplingParams, request_id: str) -> AsyncIterator[Any]:
        for tokens, reason in self.steps:
            answer = CompletionOutput(0, "", tokens, None, None, finish_reason=reason)
            yield RequestOutput(request_id, None, [1], None, [answer], reason is not None)


def params(kind: RequestOutputKind, **structure: Any) -> SamplingParams:
    made = SamplingParams(structured_outputs=StructuredOutputsParams(**structure), output_kind=kind)
    assert made.structured_outputs is not None
    made.structured_outputs._backend = "xgrammar"
    return made


async def ask(client: Client, asked: SamplingParams) -> list[RequestOutput]:
    dead_ends.install(client)
    return [output async for output in client.generate("a", asked, request_id="r")]


def tokens(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


WHOLE, PIECES = RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA
LATER = {"grammar": 'root ::= "ab" end\nend ::= end "c"'}


@pytest.mark.parametrize("structure", [{"json": {"$ref": "#"}}, {"grammar": "root ::= root root"}])
async def test_no_text_satisfies_it(structure: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError, match="no further text after 0 tokens"):
        await ask(Client([(tokens("x"), "error")]), params(WHOLE, **structure))


async def test_it_ends_nowhere_from_some_point_on() -> None:
    with pytest.raises(VLLMValidationError, match="after 2 tokens"):
        await ask(Client([(tokens("abx"), "error")]), params(WHOLE, **LATER))
    with pytest.raises(VLLMValidationError, match="after 2 tokens"):
        await ask(Client([(tokens("a"), None), (tokens("b"), None), (tokens("x"), "error")]), params(PIECES, **LATER))


async def test_what_the_compiler_refuses_is_the_clients_error_too() -> None:
    with pytest.raises(VLLMValidationError, match="after 0 tokens"):
        await ask(Client([([], "error")]), params(WHOLE, json={"type": "integer", "minimum": 5, "maximum": 3}))


async def test_an_error_that_is_not_the_grammars_stays_one() -> None:
    fair = params(WHOLE, grammar='root ::= "ab" root | "c"')
    (output,) = await ask(Client([(tokens("abx"), "error")]), fair)
    assert output.outputs[0].finish_reason == "error"
    (output,) = await ask(Client([([5], "error")]), SamplingParams())
    assert output.outputs[0].finish_reason == "error"


async def test_answers_that_end_well_pass() -> None:
    outputs = await ask(Client([(tokens("a"), None), (tokens("b"), "stop")]), params(PIECES, grammar='root ::= "ab"'))
    assert [list(output.outputs[0].token_ids) for output in outputs] == [tokens("a"), tokens("b")]
