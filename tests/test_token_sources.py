"""Who wrote each token: from the scheduler's notes through vLLM's own output objects to the answer on the wire."""

import json
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import msgspec
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from aurora.goodput import MODEL, NEURAL, TABLE
from serve import request_options
from serve.source_answers import install, text_of
from serve.token_sources import SourceBook, SourceNotes
from tests.local_http import serving
from tests.waiting import wait_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKS = {"model": "m", "aurora_token_sources": True}


class Processor:
    """Plays vLLM's output processor: says what it was given."""

    def __init__(self) -> None:
        self.seen: list[EngineCoreOutput] = []

    def process_outputs(self, outputs, time_s, stats=None):
        self.seen += outputs
        return (time_s, stats)


def _sent(output: EngineCoreOutput) -> EngineCoreOutput:
    """What comes out at the other end of the socket."""
    outputs = EngineCoreOutputs(outputs=[output])
    return msgspec.msgpack.decode(msgspec.msgpack.encode(outputs), type=EngineCoreOutputs).outputs[0]


def _step(notes: SourceNotes, book: SourceBook, drafter: int, emitted: int, kept: int | None = None, **fields):
    """One step of request "r" through vLLM's objects; what its output processor saw."""
    notes.wrote("r", drafter, emitted)
    output = EngineCoreOutput("r", [7] * (emitted if kept is None else kept), **fields)
    notes.attach({0: EngineCoreOutputs(outputs=[EngineCoreOutput("other", [1]), output])})
    processor = Processor()
    book.listen(processor)
    assert processor.process_outputs([_sent(output)], 1.5, stats="s") == (1.5, "s")
    return processor.seen[0]


@pytest.mark.parametrize(("drafter", "kind"), [(NEURAL, "eagle3"), (TABLE, "ngram"), (MODEL, "model")])
def test_accepted_drafts_are_their_drafters_and_the_last_token_is_the_targets(drafter: int, kind: str) -> None:
    notes, book = SourceNotes(), SourceBook(speculates=True)
    name = book.open()
    notes.begin("r", name)
    assert _step(notes, book, drafter, emitted=3).kv_transfer_params is None, "vLLM never sees the note"
    assert _step(notes, book, drafter, emitted=1).kv_transfer_params is None
    assert book.take(name, 4) == [kind, kind, "target", "target"]


def test_a_stop_cuts_the_targets_token_first() -> None:
    notes, book = SourceNotes(), SourceBook(speculates=True)
    name = book.open()
    notes.begin("r", name)
    _step(notes, book, TABLE, emitted=4, kept=2)
    assert book.take(name, 2) == ["ngram", "ngram"]


def test_what_a_connector_says_stays() -> None:
    notes, book = SourceNotes(), SourceBook(speculates=True)
    notes.begin("r", book.open())
    assert _step(notes, book, NEURAL, 2, kv_transfer_params={"host": 1}).kv_transfer_params == {"host": 1}


def test_requests_that_do_not_ask_cost_nothing_and_names_end_with_their_answers() -> None:
    notes, book = SourceNotes(), SourceBook(speculates=True)
    output = EngineCoreOutput("r", [1, 2])
    notes.attach({0: EngineCoreOutputs(outputs=[output])})
    assert output.kv_transfer_params is None
    name = book.open()
    book.close(name)
    book.add(name, "ngram", 1, 2)
    assert book._waiting == {}
    notes.begin("r", name)
    notes.finish("r")
    assert "r" not in notes


def test_without_speculation_the_target_writes_and_a_lost_note_is_no_guess() -> None:
    for speculates, source in ((False, "target"), (True, "unknown")):
        book = SourceBook(speculates=speculates)
        assert book.take(book.open(), 2) == [source] * 2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=20), st.data())
def test_however_tokens_are_cut_into_chunks_sources_stay_in_order(steps, data) -> None:
    book = SourceBook(speculates=True)
    name, expected = book.open(), []
    for accepted, tokens in steps:
        book.add(name, "ngram", accepted, tokens)
        drafted = min(accepted, tokens)
        expected += ["ngram"] * drafted + ["target"] * (tokens - drafted)
    taken: list[str] = []
    while len(taken) < len(expected):
        taken += book.take(name, data.draw(st.integers(1, len(expected) - len(taken))))
    assert taken == expected


class App:
    """An OpenAI-like application: answers the tokens 1 to 5, the first two drafted, as vLLM would."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.processor = Processor()
        for path in (CHAT, TEXT):
            self.app.post(path)(self._answer)
        self.app.middleware_stack = self.app.build_middleware_stack()
        request_options.install(self.app)
        self.book = SourceBook(speculates=True)
        tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
        client = SimpleNamespace(output_processor=self.processor, tokenizer=tokenizer)
        install(self.app, self.book, client)
        self.url = ""
        self.body: dict = {}

    async def _answer(self, request: Request):
        self.body = await request.json()
        name = (self.body.get("vllm_xargs") or {}).get("aurora_token_sources")
        note = {"aurora_token_sources": [name, "ngram", 2, 5]} if name else None
        self.processor.process_outputs([EngineCoreOutput("r", [1, 2, 3, 4, 5], kv_transfer_params=note)], 0)
        ids = {"token_ids": [1, 2, 3, 4, 5]} if self.body.get("return_token_ids") else {}
        if self.body.get("fails"):
            return JSONResponse({"error": {"message": "no"}}, 400)
        if self.body.get("stream"):
            return StreamingResponse(self._stream(bool(ids)), media_type="text/event-stream")
        return {"id": "c", "choices": [{"index": 0, "text": "é", **ids}], "usage": {"x": 1.50}}

    async def _stream(self, with_ids: bool):
        for ids in ([], [1], [2, 3, 4], [5]):
            chunk = {"id": "c", "choices": [{"index": 0, "delta": {}, **({"token_ids": ids} if with_ids else {})}]}
            text = f"data: {json.dumps(chunk)}\n\n"
            yield text[:9]
            yield text[9:]
        yield 'data: {"id": "c", "choices": [], "usage": {"completion_tokens": 5}}\n\ndata: [DONE]\n\n'

    def post(self, body: object, path: str = CHAT) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30)

    def wait_forgotten(self) -> None:
        """A client may have its whole answer before the server has put it away."""
        wait_until(lambda: self.book._waiting == {}, 30, "the sources of answers that are complete are forgotten")


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    app = App()
    with serving(app.app) as app.url:
        yield app


def test_a_whole_answer_says_who_wrote_it(app: App) -> None:
    answer = app.post({**ASKS, "prompt": [1, 2]}, TEXT)
    assert answer.json()["aurora"] == {
        "sources": ["ngram", "ngram", "target", "target", "target"],
        "texts": ["<1>", "<2>", "<3>", "<4>", "<5>"],
    }
    plain = app.post({"model": "m", "return_token_ids": True, "prompt": [1, 2]}, TEXT)
    assert answer.text.startswith(plain.text.removesuffix("}")), "the rest is as it was, byte for byte"
    assert "aurora_token_sources" not in app.body
    app.wait_forgotten()


def test_each_chunk_says_who_wrote_its_tokens(app: App) -> None:
    answer = app.post({**ASKS, "stream": True, "vllm_xargs": {"domain": "sql"}})
    assert app.body["vllm_xargs"]["domain"] == "sql"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    said = [chunk.get("aurora", {}).get("sources") for chunk in chunks]
    assert said == [None, ["ngram"], ["ngram", "target", "target"], ["target"], None]
    app.wait_forgotten()


@pytest.mark.parametrize(
    "body", [{"model": "m"}, {**ASKS, "aurora_token_sources": False}, {"m": "aurora_token_sources"}]
)
def test_who_does_not_ask_gets_what_was_sent(app: App, body: dict) -> None:
    assert "aurora" not in app.post(body).json()
    assert "return_token_ids" not in app.body


def test_errors_pass_as_they_are(app: App) -> None:
    answer = app.post({**ASKS, "fails": True})
    assert (answer.status_code, answer.json()) == (400, {"error": {"message": "no"}})


@pytest.mark.parametrize(
    "wrong",
    [
        {"aurora_token_sources": "yes"},
        {"aurora_token_sources": 1},
        {"n": 2},
        {"prompt": ["a", "b"]},
        {"use_beam_search": True},
        {"vllm_xargs": {"aurora_token_sources": "a name of another request"}},
    ],
)
def test_what_makes_no_sense_is_refused(app: App, wrong: dict) -> None:
    answer = app.post({**ASKS, **wrong}, TEXT)
    assert answer.status_code == 400
    assert "aurora_token_sources" in answer.json()["error"]["message"]


def test_a_character_of_several_tokens_comes_with_its_last_one() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = text_of(SimpleNamespace(_tokenizer=tokenizer))
    assert [text(token) for token in tokenizer.encode("a é").ids] == ["a", " ", "", "é"]
