"""Controller and tables put together: whose drafts are used, whose are learned from, who sees whose text."""

from aurora.config import SpeculationConfig
from aurora.controller import RequestView
from aurora.goodput import MODEL, NEURAL, TABLE
from aurora.step_time import StepWork
from serve.portfolio import Portfolio

K = 4


def _portfolio(**fields: object) -> Portfolio:
    return Portfolio(SpeculationConfig(k_max=K, ngram_mib=1, **fields), K)


def _view(request_id: str) -> RequestView:
    return RequestView(request_id, 10, drafting=True, limit=K)


def _settled(portfolio: Portfolio, request_id: str, neural: list[int], limit: int = K) -> list[int]:
    return portfolio.settle({request_id: neural}, {request_id: limit})[request_id].tokens


def _say(portfolio: Portfolio, request_id: str, tokens: list[int], *, tenant: str = "", domain: str = "") -> None:
    """A whole request that answers `tokens`."""
    portfolio.begin(request_id, tenant, domain, [1], len(tokens))
    portfolio.plan([_view(request_id)])
    portfolio.observe(request_id, 0, tokens)
    portfolio.finish([request_id])


def _table_drafts(portfolio: Portfolio, prompt: list[int], *, tenant: str = "", domain: str = "") -> list[int]:
    portfolio.begin("probe", tenant, domain, prompt, 8)
    portfolio.plan([_view("probe")])
    drafted = portfolio.settle({"probe": []}, {"probe": K})["probe"].table
    portfolio.finish(["probe"])
    return drafted


def test_what_one_tenant_was_told_is_drafted_for_no_other_unless_that_is_allowed():
    for isolated in (True, False):
        portfolio = _portfolio(isolate_tenants=isolated)
        _say(portfolio, "a", [50, 51, 52], tenant="alice")
        assert _table_drafts(portfolio, [50], tenant="alice") == [51, 52]
        assert _table_drafts(portfolio, [50], tenant="bob") == ([] if isolated else [51, 52])
        assert _table_drafts(portfolio, [50], tenant="") == ([] if isolated else [51, 52])


def test_fixed_k_verifies_the_neural_drafts_cut_to_the_limit():
    portfolio = _portfolio(fixed_k=3)
    portfolio.begin("a", "", "", [1, 2, 1], 8)
    assert portfolio.plan([_view("a")]).cap == 3
    assert _settled(portfolio, "a", [7, 8, 9]) == [7, 8, 9]
    assert portfolio.one_hot == {}
    assert _settled(portfolio, "a", [7, 8, 9], limit=1) == [7]


def test_without_a_neural_drafter_the_table_drafts():
    portfolio = _portfolio(drafters=("ngram",), fixed_k=2)
    portfolio.begin("a", "", "", [1, 2, 3, 1], 8)
    assert portfolio.plan([_view("a")]).skip_drafter
    assert _settled(portfolio, "a", []) == [2, 3]
    assert portfolio.one_hot == {"a": TABLE}


def test_without_a_table_nothing_is_remembered():
    portfolio = _portfolio(drafters=("eagle3",))
    _say(portfolio, "a", [50, 51, 52])
    assert _table_drafts(portfolio, [50]) == []


def test_neural_drafts_of_a_cold_request_are_void():
    portfolio = _portfolio(exploration=0.0)
    controller = portfolio.controller
    controller._credit, controller._exploring = 0.0, False
    controller.observe_step(StepWork(1, 0, 0, 10, 0, 0), 0.06)
    controller.acceptance.start("probe")
    for _ in range(100):
        controller.observe_neural("probe", 1, 0)
    portfolio.begin("a", "", "", [1], 8)
    assert portfolio.plan([_view("a")]).skip_drafter
    before = controller.acceptance.shared_rates()
    assert _settled(portfolio, "a", [7, 8]) == []
    portfolio.observe("a", 0, [7])
    assert (controller.acceptance.shared_rates() == before).all()


def test_drafts_that_were_not_verified_teach_by_their_first_token():
    portfolio = _portfolio(fixed_k=4)
    portfolio.begin("a", "", "", [1, 2, 3, 1], 20)
    portfolio.plan([_view("a")])
    drafts = portfolio.settle({"a": [2, 9, 9]}, {"a": K})["a"]
    assert (drafts.chosen.drafter, drafts.table[:2]) == (NEURAL, [2, 3])
    before = portfolio.controller.confidence.rates("a", drafts.cells)
    portfolio.observe("a", 3, [2, 5])  # the target took the first neural draft; the table's first was the same
    record = portfolio.controller.confidence._requests["a"]
    assert record.hits == 1
    assert 0 < record.expected <= 1
    assert portfolio.controller.confidence.rates("a", drafts.cells)[0] > before[0]
    own = portfolio.controller.acceptance._requests["a"][1]
    assert (own.hits, own.trials) == ([1, 0, 0, 0], [1, 1, 0, 0])


def test_the_draft_models_drafts_are_verified_and_learned_from():
    portfolio = _portfolio(drafters=("model", "ngram"), fixed_k=2)
    portfolio.begin("a", "", "", [1, 2, 1], 8)
    plan = portfolio.plan([_view("a")])
    assert (plan.model_cap, plan.model_for) == (2, {"a"})
    drafts = portfolio.settle({"a": []}, {"a": K}, {"a": [7, 8]})["a"]
    assert drafts.tokens == [7, 8]
    assert portfolio.one_hot == {"a": MODEL}
    portfolio.observe("a", 2, [7, 9])
    own = portfolio.controller.model_acceptance._requests["a"][1]
    assert (own.hits, own.trials) == ([1, 0, 0, 0], [1, 1, 0, 0])
    assert portfolio.take_first_drafts(MODEL) == (1, 1)
    assert portfolio.take_first_drafts(MODEL) == (0, 0)
    assert portfolio.take_first_drafts() == (0, 0)


def test_finished_requests_leave_only_their_answer():
    portfolio = _portfolio()
    _say(portfolio, "a", [50, 51, 52])
    assert portfolio._drafts == {}
    assert portfolio.controller._known == set()
    assert _table_drafts(portfolio, [50]) == [51, 52]
    assert "a" not in portfolio


def test_a_request_keeps_the_domain_that_it_began_with():
    portfolio = _portfolio()
    assert portfolio.begin("a", "", "sql", [1, 2], 8) == "sql"
    assert "a" in portfolio
    assert portfolio.domain_of("a") == "sql"


def test_clusters_of_prompts_are_domains_unless_that_is_switched_off():
    for switched_on in (True, False):
        portfolio = _portfolio(cluster_domains=switched_on)
        domains = []
        for i in range(30):
            prompt = [i, *range(1000, 1040), i]
            domains.append(portfolio.begin(f"{i}", f"tenant {i % 2}", "", prompt, 4))
            portfolio.finish([f"{i}"])
        assert domains[-1].startswith("cluster-") == switched_on
