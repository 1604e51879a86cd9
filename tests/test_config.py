from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import ValidationError

from aurora.codec import CODECS
from aurora.config import AuroraConfig, CaptureConfig, ConfigError, UserError, load_config


def test_flags_override_the_file_which_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "aurora.yaml"
    file.write_text("server: {port: 9000, host: 0.0.0.0}\nmodel: some/model\n")
    config = load_config(file, {"server.port": 9001, "model": None})
    assert (config.server.port, config.server.host, config.model) == (9001, "0.0.0.0", "some/model")
    assert config.speculation.k_max == AuroraConfig().speculation.k_max


def test_the_codecs_to_choose_from_are_those_there_are() -> None:
    assert set(get_args(CaptureConfig.model_fields["codec"].annotation)) == set(CODECS)


def test_what_is_printed_loads_again(tmp_path: Path) -> None:
    config = load_config(None, {"trainer.seed": 7, "vllm_args": ("--max-model-len", "64")})
    file = tmp_path / "aurora.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(file, {}) == config


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("sever: {port: 1}", "sever: unknown key"),
        ("server: {prot: 1}", "server.prot: unknown key"),
        ("server: {port: 70000}", "server.port: .*65535.*70000"),
        ("speculation: {fixed_k: 9}", "fixed_k 9 exceeds k_max 4: raise k_max"),
        (
            "speculation: {drafters: 'ngram,eagle3'}",
            r"speculation.drafters: give a list, such as \[a, b\], got 'ngram,ea",
        ),
        ("speculation: {drafters: [ngrm]}", r"^speculation.drafters.0: Input should be 'eagle3', [^;]*, got 'ngrm' \("),
        ("speculation: {drafters: []}", "speculation.drafters: .*at least 1 item"),
        ("trainer: 1", "trainer: a section of keys; set one of them, such as trainer.KEY, got 1"),
        ("- a list", "expected a mapping at the top, got list"),
        ("a: [", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_the_key(tmp_path: Path, text: str, names: str) -> None:
    file = tmp_path / "aurora.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=names) as caught:
        load_config(file, {})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("trainer.dutty", "did you mean trainer.duty? "),
        ("sever", "did you mean server? "),
        ("publish_interval_s", "did you mean trainer.publish_interval_s? "),
        ("trainer.enabled_", "did you mean trainer.enabled? "),
        ("nope", ""),
    ],
)
def test_an_unknown_key_is_met_with_what_may_have_been_meant(key: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {key: 1})
    assert str(caught.value) == f"{key}: unknown key; {meant}see `aurora config show`"


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml", {})
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(binary, {})


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("")
    assert load_config(file, {}) == AuroraConfig()


def test_an_override_below_a_plain_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="server: expected a mapping, got 3"):
        load_config(None, {"server": 3, "server.port": 1})


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        AuroraConfig().server.port = 1


def test_nothing_is_learned_without_speculation() -> None:
    assert AuroraConfig().learning
    assert not load_config(None, {"speculation.enabled": False}).learning
    assert not load_config(None, {"trainer.enabled": False}).learning
    assert not load_config(None, {"speculation.drafters": ("ngram",)}).learning, "a table needs no trainer"


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert AuroraConfig().cache_dir == tmp_path / "aurora"


def test_something_must_be_learned_from() -> None:
    with pytest.raises(ConfigError, match="accepted_weight 0 leaves nothing to imitate"):
        load_config(None, {"trainer.accepted_weight": 0})
    with pytest.raises(ConfigError, match="accepted_weight 0"):
        load_config(
            None, {"trainer.accepted_weight": 0, "trainer.rejected_weight": 1, "trainer.loss": "accepted_length"}
        )
    assert load_config(None, {"trainer.accepted_weight": 0, "trainer.rejected_weight": 0.5}).trainer.learns_rejected


def test_traces_are_taken_for_the_trainer_or_for_the_log(tmp_path: Path) -> None:
    assert load_config(None, {}).captures
    assert not load_config(None, {"trainer.enabled": False}).captures
    assert load_config(None, {"trainer.enabled": False, "capture.log_dir": tmp_path}).captures
    with pytest.raises(ConfigError, match=r"capture\.log_dir: there are traces of neural drafters only"):
        load_config(None, {"capture.log_dir": tmp_path, "speculation.drafters": ("ngram",)})


def test_on_a_cluster_and_among_replicas_the_endpoint_is_a_routers() -> None:
    assert not load_config(None, {}).routed
    assert load_config(None, {"cluster.replicas": 2}).routed
    assert load_config(None, {"cluster.address": "auto"}).routed
