import pytest

from aurora.scrape import Scrape, acceptance_length, parse_scrape, tokens_per_step, versions_seen

AURORA = """\
# TYPE aurora_draft_steps_total counter
aurora_draft_steps_total{version="0"} 10
aurora_draft_steps_total{version="1"} 5
# TYPE aurora_accepted_tokens_total counter
aurora_accepted_tokens_total{version="0"} 4
aurora_accepted_tokens_total{version="1"} 11
# TYPE aurora_request_steps_total counter
aurora_request_steps_total 20
# TYPE aurora_emitted_tokens_total counter
aurora_emitted_tokens_total 35
# TYPE aurora_drafter_version gauge
aurora_drafter_version 1
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0"} 999
"""
VLLM = """\
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 3
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 1
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 6
"""


def test_auroras_own_counters_come_first():
    assert parse_scrape(AURORA) == Scrape({0: 10, 1: 5}, {0: 4, 1: 11}, 20, 35, 1)


def test_replicas_count_together_and_the_newest_version_is_live():
    page = """\
# TYPE aurora_draft_steps_total counter
aurora_draft_steps_total{version="-1",replica="a"} 10
aurora_draft_steps_total{version="-1",replica="b"} 5
# TYPE aurora_drafter_version gauge
aurora_drafter_version{replica="a"} 3
aurora_drafter_version{replica="b"} 2
"""
    assert parse_scrape(page) == Scrape({-1: 15}, {}, 0, 0, 3)


def test_vllm_counters_tell_acceptance_but_no_version():
    scrape = parse_scrape(VLLM)
    assert acceptance_length(parse_scrape(""), scrape) == pytest.approx(2.5)
    assert versions_seen([parse_scrape(""), scrape]) == []
    assert tokens_per_step(parse_scrape(""), scrape) is None


def test_a_server_without_speculation_tells_nothing():
    page = parse_scrape("# TYPE vllm:prompt_tokens_total counter\nvllm:prompt_tokens_total 7\n")
    assert acceptance_length(page, page) is None
    assert versions_seen([page, page]) == []


def test_differences():
    before, after = parse_scrape(AURORA), Scrape({0: 10, 1: 9}, {0: 4, 1: 19}, 24, 50, 2)
    assert acceptance_length(before, after) == pytest.approx(3)
    assert tokens_per_step(before, after) == pytest.approx(3)
    assert acceptance_length(before, before) is None
    assert acceptance_length(None, after) is None
    assert tokens_per_step(before, None) is None


def test_a_restarted_server_counts_from_zero():
    assert acceptance_length(Scrape({1: 100}, {1: 300}), Scrape({1: 4}, {1: 4})) == pytest.approx(2)


def test_versions_are_those_live_or_drafting():
    scrapes = [Scrape({1: 5, 2: 1}, live_version=2), None, Scrape({1: 5, 2: 2, 3: 1}, live_version=4)]
    assert versions_seen(scrapes) == [2, 3, 4]
    assert versions_seen([None]) == []


def test_text_that_is_no_page():
    with pytest.raises(ValueError, match=r"."):
        parse_scrape("<html>not metrics</html>")
