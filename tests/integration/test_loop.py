"""The closed loop on a real engine: it learns while it serves, and nothing a user sees depends on that."""

import json
import os
import signal
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from aurora.store import DrafterStore
from aurora.trace import SOURCES
from aurora.traffic import TrafficOptions, run
from tests.integration.process import ServedModel, random_prompts
from tests.waiting import wait_until

pytestmark = pytest.mark.engine

_DRAFTED, _SAID = "vllm:spec_decode_num_draft_tokens_total", "vllm:generation_tokens_total"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"


def test_the_openai_routes_answer(learning: ServedModel) -> None:
    client = openai.OpenAI(base_url=f"{learning.url}/v1", api_key="none")
    name = client.models.list().data[0].id
    chat = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hello"}], max_tokens=8)
    assert chat.usage is not None
    assert 0 < chat.usage.completion_tokens <= 8
    stream = client.completions.create(model=name, prompt="abc", max_tokens=8, stream=True)
    assert list(stream)
    assert learning.get("/health") == ""
    assert json.loads(learning.get("/version"))["version"]
    metrics = learning.get("/metrics")
    assert "vllm:spec_decode_num_drafts" in metrics
    assert "aurora_drafter_version" in metrics


def test_greedy_text_is_the_targets_while_drafters_are_swapped(learning: ServedModel, plain: ServedModel) -> None:
    """60 prompts, again and again until at least two more swaps happened: token-identical each time."""
    prompts = random_prompts(60)
    expected = plain.answers(prompts)
    assert len({tuple(e) for e in expected}) > 50
    before = learning.metric("aurora_swaps_total")
    for _ in range(30):
        assert learning.answers(prompts) == expected
        if learning.metric("aurora_swaps_total") >= before + 2:
            break
    assert learning.metric("aurora_swaps_total") >= before + 2
    assert learning.metric("aurora_accepted_tokens_total") > 0
    assert learning.metric("aurora_swap_failures_total") == 0


def test_traffic_reports_what_happened(learning: ServedModel, tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"question {i % 7}"}) + "\n" for i in range(40)))
    out = tmp_path / "out.json"
    options = TrafficOptions(dataset=str(rows), url=learning.url, concurrency=4, max_tokens=32, json_file=out)
    assert run(options) == 0
    result = json.loads(out.read_text())
    assert (result["requests"], result["failures"]) == (40, 0)
    assert result["tokens_per_s"] > 0
    assert result["drafter_versions"]


@pytest.mark.parametrize("actor", ["Trainer", "Reporter"])
def test_the_death_of_an_actor_fails_no_request(learning: ServedModel, actor: str) -> None:
    pid, version = learning.actor_pid(actor), int(learning.metric("aurora_drafter_version"))
    prompts = random_prompts(30, seed=1)
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(learning.answers, prompts)
        os.kill(pid, signal.SIGKILL)
        assert all(answers.result())
    if actor == "Trainer":
        learning.serve_until_version(version + 1)
        assert learning.actor_pid(actor) != pid


def test_published_versions_verify_and_wandb_wrote_offline(learning: ServedModel) -> None:
    learning.serve_until_version(2)
    store = DrafterStore(learning.run_dir / "drafters")
    newest = store.latest()
    assert newest is not None
    version = store.verify(newest)
    assert version.metadata["acceptance_length"] >= 1
    assert list((learning.run_dir / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_seed_gives_the_same_text_again_though_the_prompt_takes_several_steps(learning: ServedModel) -> None:
    fields = {"temperature": 1.0, "seed": 7, "max_tokens": 1}
    texts = [learning.complete("a long prompt " * 28, **fields)["choices"][0]["token_ids"] for _ in range(3)]
    assert texts[0] == texts[1] == texts[2]
    other = [
        learning.complete("a long prompt " * 28, **{**fields, "seed": s})["choices"][0]["token_ids"] for s in range(8)
    ]
    assert len({tuple(t) for t in other}) > 1, "the text depends on the seed"


def test_a_cached_prefix_is_worth_as_much_as_without_speculation(learning: ServedModel, plain: ServedModel) -> None:
    prompt = [5 + i % 251 for i in range(400)]

    def found(server: ServedModel) -> float:
        before = server.metric("vllm:prefix_cache_hits_total")
        server.answers([prompt], tokens=2)
        server.answers([[*prompt, 7]], tokens=2)
        return server.metric("vllm:prefix_cache_hits_total") - before

    assert found(learning) == found(plain) > 256


def test_requests_of_every_kind_work_under_speculation(learning: ServedModel) -> None:
    variants = [
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logprobs": 3},
        {"stop": ["zz"]},
        {"temperature": 0.8, "seed": 3, "top_p": 0.9, "top_k": 20},
        {"temperature": 0.8, "top_k": 20},
        {"n": 2, "temperature": 1.0},
        {"metadata": {"domain": "sql"}},
        {"vllm_xargs": {"domain": "sql"}},
        {"max_tokens": 1},
        {"max_tokens": 450},
        {"structured_outputs": {"regex": "[a-c]{5,30}"}},
        {
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            "repetition_penalty": 1.1,
            "logprobs": 2,
            "structured_outputs": {"regex": "[a-c]{5,30}"},
            "stop": ["cab"],
            "seed": 3,
            "temperature": 0.8,
        },
    ]
    for fields in variants:
        assert learning.complete("some text", **fields)["choices"]
    for fields in ({"min_p": 0.1}, {"logit_bias": {"7": 5}}):
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            learning.complete("some text", temperature=0.8, **fields)  # a greedy request drops min_p
        assert next(iter(fields)) in json.loads(refused.value.read())["error"]["message"]


def test_requests_learn_who_wrote_their_tokens(learning: ServedModel) -> None:
    prompt, fields = [11, 12, 13] * 12, {"max_tokens": 64, "aurora_token_sources": True}
    plain = learning.complete(prompt, max_tokens=64)["choices"][0]["token_ids"]
    before = {name: learning.metric(name) for name in (_DRAFTED, _ACCEPTED, _SAID)}
    whole = learning.complete(prompt, **fields)
    wait_until(lambda: learning.metric(_SAID) == before[_SAID] + 64, 30, "tokens are counted")
    accepted = learning.metric(_ACCEPTED) - before[_ACCEPTED]
    assert whole["choices"][0]["token_ids"] == plain, "to ask changes no token"
    assert "kv_transfer_params" not in whole or whole["kv_transfer_params"] is None
    sources = whole["aurora"]["sources"]
    assert len(sources) == len(whole["aurora"]["texts"]) == 64
    assert set(sources) <= set(SOURCES)
    assert 0 <= accepted - sum(source != "target" for source in sources) <= 3, "the last step's may be cut off"
    assert accepted > 0, "the table knows the answer by now"
    assert set(learning.complete(prompt, **fields, max_speculation=0)["aurora"]["sources"]) == {"target"}
    client = openai.OpenAI(base_url=f"{learning.url}/v1", api_key="none")
    chunks = client.chat.completions.create(
        model=learning.model_name(),
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"aurora_token_sources": True},
    )
    said, tokens = [], 0
    for chunk in chunks:
        extra = chunk.model_extra or {}
        said += extra.get("aurora", {}).get("sources", [])
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    assert len(said) == tokens > 0
    assert set(said) <= set(SOURCES)


def test_the_page_shows_what_the_engine_did(learning: ServedModel) -> None:
    def points() -> list[dict[str, Any]]:
        learning.answers(random_prompts(8), metadata={"domain": "page"})
        return [p for p in json.loads(learning.get("/aurora/data"))["points"] if "page" in p["domains"]]

    wait_until(points, 60, "a point has the domain")
    data = json.loads(learning.get("/aurora/data"))
    last = points()[-1]
    assert last["speed_up"] > 0
    assert sum(last["sources"].values()) == last["emitted"] > 0
    assert {swap["kind"] for swap in data["swaps"]} == {"eagle3", "model"}
    assert data["live"]["eagle3"] >= 1
    assert data["versions"]
    assert "page.js" in learning.get("/aurora")


def test_requests_bound_their_drafts_and_wrong_bounds_are_refused(learning: ServedModel) -> None:
    prompt, tokens = [7, 8, 9] * 12, 64

    def drafted(**fields: object) -> float:
        """By vLLM's counters, which count a step's drafts and its tokens together and in the order of the steps."""
        before, said = learning.metric(_DRAFTED), learning.metric(_SAID)
        learning.complete(prompt, max_tokens=tokens, **fields)
        wait_until(lambda: learning.metric(_SAID) == said + tokens, 30, "tokens are counted")
        return learning.metric(_DRAFTED) - before

    drafted()
    assert drafted() > 0, "the table knows the answer by now"
    assert drafted(max_speculation=0) == 0
    for wrong in ({"max_speculation": -1}, {"vllm_xargs": {"max_speculation": 1.5}}, {"metadata": {"domain": 7}}):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            learning.complete(prompt, **wrong)
