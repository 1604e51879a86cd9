import dataclasses
import json
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from aurora import __version__
from aurora.cli import _parser, main
from aurora.config import AuroraConfig
from aurora.options import OPTIONS, REFUSED, split_model

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "ray", "vllm", "wandb", "transformers", "datasets", "openai")


def loaded_by(statement: str) -> set[str]:
    script = f"import json, sys\n{statement}\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_import_and_help_load_nothing_heavy() -> None:
    ask_help = "from aurora.cli import main\ntry: main(['serve', '--help'])\nexcept SystemExit: pass"
    assert loaded_by("import aurora") == set()
    assert loaded_by(ask_help) == set()
    assert loaded_by("from aurora.cli import main; main(['config', 'show'])") == set()


def test_the_wheel_holds_the_four_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("aurora_specdec-*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    names = {name.split("/")[0] for name in files}
    assert {name for name in names if not name.endswith(".dist-info")} == {"aurora", "drafters", "serve", "trainer"}
    shipped = [path for path in (ROOT / "aurora" / "deploy").rglob("*") if path.is_file()]
    assert len(shipped) >= 15
    assert {str(path.relative_to(ROOT)) for path in shipped} <= files


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["config", "show", *arguments]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_config_show_prints_what_serve_would_use(capsys: pytest.CaptureFixture[str]) -> None:
    tree = show(capsys, "org/model", "--port", "9", "--no-learning", "--set", "capture.sink_mib=64", "--fixed-k", "3")
    assert (tree["model"], tree["server"]["port"], tree["capture"]["sink_mib"]) == ("org/model", 9, 64)
    assert (tree["trainer"]["enabled"], tree["speculation"]["fixed_k"]) == (False, 3)


def test_every_option_names_a_configuration_key() -> None:
    for option in OPTIONS:
        tree: Any = AuroraConfig()
        for part in option.key.split("."):
            assert part in type(tree).model_fields, option.flag
            tree = getattr(tree, part)


def test_flags_that_are_not_ours_go_to_vllm_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    tree = show(capsys, "m", "--max-model-len", "64", "--port", "9", "--dtype=float32", "--", "--seed", "1")
    assert tree["vllm_args"] == ["--max-model-len", "64", "--dtype=float32", "--seed", "1"]
    assert tree["server"]["port"] == 9


def test_our_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean --trainer-threads?" in fails(capsys, "config", "show", "--trainer-thread", "2")


@pytest.mark.parametrize(
    ("flag", "meant"),
    [("--prot", "--port"), ("--publish-intervall=3", "--publish-interval"), ("--run_dir", "--run-dir")],
)
def test_a_flag_that_is_nearly_ours_is_refused(flag: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, "serve", "m", flag, "1")
    assert f"{flag.partition('=')[0]}: no such flag; did you mean {meant}?" in said


def test_a_second_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "other: the model is m already" in fails(capsys, "config", "show", "m", "other")


@pytest.mark.parametrize(
    ("rest", "model", "args"),
    [
        ([], None, ()),
        (["m"], "m", ()),
        (["--x", "1"], None, ("--x", "1")),
        (["m", "--x"], "m", ("--x",)),
        (["--", "--x"], None, ("--x",)),
    ],
)
def test_the_model_comes_before_the_flags_of_vllm(rest: list[str], model: str | None, args: tuple[str, ...]) -> None:
    assert split_model(rest) == (model, args)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("aurora: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_flags_that_aurora_controls_are_refused_by_name(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{flag}: {REFUSED[flag]}" in fails(capsys, "config", "show", "m", flag, "x")
    spelt = flag.replace("-", "_").replace("__", "--", 1) + ".key=1"
    assert REFUSED[flag] in fails(capsys, "config", "show", "m", flag if flag == "-sc" else spelt)


def test_a_controlled_flag_in_the_file_is_refused_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "aurora.yaml"
    file.write_text("vllm_args: [--worker-cls, x]\n")
    assert "--worker-cls" in fails(capsys, "serve", "--config", str(file))


@pytest.mark.parametrize(
    ("setting", "names"),
    [("seed", "expected KEY=VALUE"), ("a..b=1", "expected KEY=VALUE"), ("a=[", "not YAML"), ("a.b=1", "unknown key")],
)
def test_a_bad_setting_is_refused(setting: str, names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert names in fails(capsys, "config", "show", "--set", setting)


def test_serve_hands_the_configuration_to_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AuroraConfig] = []
    launcher = types.ModuleType("aurora.launch")
    launcher.serve = lambda config: seen.append(config) or 7
    monkeypatch.setitem(sys.modules, "aurora.launch", launcher)
    assert main(["serve", "m", "--k-max", "6"]) == 7
    assert seen[0].speculation.k_max == 6


def test_errors_that_are_not_the_users_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: AuroraConfig) -> int:
        raise ValueError("a bug")

    launcher = types.ModuleType("aurora.launch")
    launcher.serve = broken
    monkeypatch.setitem(sys.modules, "aurora.launch", launcher)
    with pytest.raises(ValueError, match="a bug"):
        main(["serve"])


@pytest.mark.parametrize("arguments", [["doctor", "x"], ["traffic", "x", "--concurency", "2"], ["nothing"], []])
def test_unknown_arguments_of_our_own_commands_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_an_unknown_argument_sends_to_the_commands_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--prot", "3"])
    assert capsys.readouterr().err == "aurora: error: unknown argument --prot; see `aurora doctor --help`\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"aurora {__version__}\n"


def test_traffic_has_a_flag_for_every_option_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from aurora import traffic

    seen: list[traffic.TrafficOptions] = []
    monkeypatch.setattr(traffic, "run", lambda options: seen.append(options) or 0)
    assert main(["traffic", "x.jsonl"]) == 0
    assert main(["traffic", "x.jsonl", "--variant", "sudden", "--limit", "3", "--rate", "0.5"]) == 0
    assert seen[0] == traffic.TrafficOptions("x.jsonl")
    assert seen[1] == traffic.TrafficOptions("x.jsonl", variant="sudden", limit=3, rate=0.5)
    parsed = vars(_parser().parse_args(["traffic", "x"]))
    assert set(parsed) - {"run", "passes_rest"} == {field.name for field in dataclasses.fields(traffic.TrafficOptions)}


def test_a_bad_traffic_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--limit 0" in fails(capsys, "traffic", "x.jsonl", "--limit", "0")
    assert "no such file" in fails(capsys, "traffic", "/none.jsonl")


def test_bench_takes_the_model_first_and_passes_other_flags_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from aurora import bench
    from aurora.bench_options import BenchOptions, Load

    seen: list[BenchOptions] = []
    monkeypatch.setattr(bench, "run", lambda options: seen.append(options) or 0)
    assert main(["bench"]) == 0
    mine = ("--rounds", "2", "--concurrency", "2,8@0.7", "--dataset", "a", "--dataset", "b", "--batch-table", "1:2,9:0")
    assert main(["bench", "m", *mine, "--max-model-len", "512"]) == 0
    assert seen[0] == BenchOptions()
    assert seen[1] == BenchOptions(
        model="m",
        datasets=("a", "b"),
        rounds=2,
        loads=(Load(2), Load(8, 0.7)),
        batch_table=((1, 2), (9, 0)),
        vllm_args=("--max-model-len", "512"),
    )
    assert "--rounds 0" in fails(capsys, "bench", "--rounds", "0")
    for flag, value, remedy in (("--concurrency", "x", "x: give N,N@T"), ("--batch-table", "1:a", "1:a: give N:K,N:K")):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", flag, value])
        assert remedy in capsys.readouterr().err
    assert "--scheduler-cls" in fails(capsys, "bench", "--scheduler-cls", "x")
