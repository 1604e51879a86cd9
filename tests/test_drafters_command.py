import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest
from safetensors.torch import load_file, save_file

from aurora.cli import main
from aurora.config import SpeculationConfig
from aurora.drafter_commands import StoreOptions, roll_back
from aurora.metrics import EngineReport
from aurora.store import REJECTED, DrafterStore
from drafters import TargetWeights, ensure_drafter, load_drafter, save_drafter
from drafters.draft_files import (
    FROZEN,
    INDEX,
    VOCABULARY,
    ensure_draft_model,
    load_draft_model,
    save_draft_model,
)
from drafters.vocab import to_mask
from serve.exporter import PrometheusExporter
from tests.local_http import serving
from tests.tiny import DRAFT_VOCAB, write_target

SPECULATION = SpeculationConfig(draft_vocab=DRAFT_VOCAB)
GATE = {"acceptance_length": 2.5, "parent_acceptance_length": 2.25, "trainer_step": 7, "tokens_trained": 1234}
Run = Callable[..., str]


def fill(run_dir: Path, directory: Path, target: TargetWeights, versions: int = 3) -> DrafterStore:
    """A store whose version n is version 1 with `fc` scaled by n; the last one drafts another token."""
    store = DrafterStore(run_dir / "drafters")
    first = ensure_drafter(store, directory, SPECULATION, seed=0)
    for number in range(2, versions + 1):
        model = load_drafter(first.path, target)
        with torch.no_grad():
            model.fc.weight *= number
        if number == versions:
            ids = model.draft_ids
            free = next(i for i in range(len(model.t2d)) if not model.t2d[i])
            ids = torch.cat([ids[:-1], torch.tensor([free])]).sort().values
            model.d2t.copy_(ids - torch.arange(len(ids)))
            model.t2d.copy_(to_mask(ids, len(model.t2d)))
        metadata = {"parent": number - 1, **GATE}
        store.publish(lambda path, model=model: save_drafter(model, path, 3, target), metadata)
    return store


@pytest.fixture
def run_dir(directory: Path, target: TargetWeights, tmp_path: Path) -> Path:
    fill(tmp_path / "run", directory, target)
    return tmp_path / "run"


@pytest.fixture
def run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `aurora drafters ...` on that run directory; gives what it printed."""

    def command(name: str, *arguments: object, code: int = 0, where: Path = run_dir) -> str:
        assert main(["drafters", name, "--run-dir", str(where), *map(str, arguments)]) == code
        captured = capsys.readouterr()
        return captured.err if code == 2 else captured.out

    return command


def test_list_says_what_each_version_is(run: Run, run_dir: Path) -> None:
    store = DrafterStore(run_dir / "drafters")
    store.reject(3, "worse [than] 2")
    (store.read(1).path / "READY").write_text("{")
    first, second, third = json.loads(run("list", "--json"))
    assert (first["state"], second["state"], third["state"]) == ("damaged", "latest", "rejected")
    assert third["reason"] == "worse [than] 2"
    assert (second["parent"], second["gate_acceptance"], second["tokens_trained"]) == (1, 2.5, 1234)
    assert second["size"] == sum(f.stat().st_size for f in store.read(2).path.glob("*.*"))
    page = run("list")
    assert "2.250 -> 2.500" in page
    assert "worse [than] 2" in page


def test_list_asks_a_server_for_live_acceptance(run: Run) -> None:
    registry = CollectorRegistry()
    report = EngineReport(draft_steps={2: 4, -1: 2, 0: 1}, accepted_tokens={2: 6, -1: 1, 0: 1})
    PrometheusExporter(registry).update(report)
    app = FastAPI()
    app.get("/metrics")(lambda: PlainTextResponse(generate_latest(registry)))
    with serving(app) as url:
        assert [row["live_acceptance"] for row in json.loads(run("list", "--json", "--url", url))] == [None, 2.5, None]
    assert "leave --url out" in run("list", "--url", url, code=2)


def test_show_checks_the_files(run: Run, run_dir: Path) -> None:
    told = json.loads(run("show", 2, "--json"))
    assert (told["damage"], told["metadata"]["trainer_step"]) == ("", 7)
    assert told["config"]["draft_vocab_size"] == DRAFT_VOCAB
    assert set(told["digests"]) == {"config.json", "model.safetensors"}
    with (run_dir / "drafters/v000002/model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert "SHA-256 differs" in run("show", 2, code=1)
    assert json.loads(run("show", 2, "--json", code=1))["damage"]


def test_a_version_can_be_named_as_its_directory_is(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "v000002", "--json") == run("show", 2, "--json")
    with pytest.raises(SystemExit):
        run("show", "two")
    assert "two: no version; give its number, such as 7 or v000007" in capsys.readouterr().err


def test_an_export_of_a_rejected_version_says_so(
    run: Run, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DrafterStore(run_dir / "drafters").reject(3, "no good")
    assert main(["drafters", "export", "--run-dir", str(run_dir), "3", str(tmp_path / "out")]) == 0
    assert "version 3 is rejected: no good" in capsys.readouterr().err
    run("export", 2, tmp_path / "two")
    assert capsys.readouterr().err == ""


def test_diff_says_how_far_each_tensor_moved(run: Run) -> None:
    found = json.loads(run("diff", 1, 2, "--json"))
    changed = {tensor["name"]: tensor["relative"] for tensor in found["tensors"] if tensor["relative"]}
    assert changed == {"fc.weight": pytest.approx(1)}
    assert (found["added"], found["removed"], found["odd"]) == ([], [], [])
    assert found["metadata"]["trainer_step"] == [0, 7]
    found = json.loads(run("diff", 2, 3, "--json"))
    assert (len(found["added"]), len(found["removed"]), found["vocabulary"]) == (1, 1, DRAFT_VOCAB)
    changed = {tensor["name"]: tensor["relative"] for tensor in found["tensors"] if tensor["relative"]}
    assert changed == {"fc.weight": pytest.approx(0.5)}, "the rows of the tokens that both can draft did not move"
    page = run("diff", 2, 3)
    assert "50.000 %" in page
    assert "1 new, 1 gone" in page


def test_a_rollback_takes_everything_newer_out_of_use(run: Run, run_dir: Path) -> None:
    assert "version 1 is the latest; rejected: 2, 3" in run("rollback", 1, "--yes", "--reason", "too eager")
    store = DrafterStore(run_dir / "drafters")  # as a server in another process sees it
    assert store.latest() == 1
    assert (store.read(3).path / REJECTED).read_text() == "too eager"
    assert "version 3: rejected (too eager); choose one of 1" in run("rollback", 3, "--yes", code=2)
    assert "nothing to go back to; usable versions: 1" in run("rollback", "--yes", code=2)


def test_a_rollback_without_a_number_goes_one_back(run: Run, run_dir: Path) -> None:
    assert "version 2 is the latest; rejected: 3" in run("rollback", "--yes")
    assert DrafterStore(run_dir / "drafters").latest() == 2


def test_a_rollback_goes_to_nothing_that_would_not_serve(run: Run, run_dir: Path) -> None:
    assert "the latest already; choose one of 1, 2" in run("rollback", 3, "--yes", code=2)
    assert "there are 1, 2, 3" in run("rollback", 9, "--yes", code=2)
    (run_dir / "drafters/v000002/model.safetensors").write_bytes(b"")
    assert "SHA-256 differs" in run("rollback", 2, "--yes", code=2)
    assert DrafterStore(run_dir / "drafters").latest() == 3


def test_a_damaged_latest_can_be_rolled_back(run: Run, run_dir: Path) -> None:
    (run_dir / "drafters/v000003/READY").write_text("{")
    assert "version 2 is the latest; rejected: 3" in run("rollback", "--yes")
    assert DrafterStore(run_dir / "drafters").latest() == 2


def test_what_is_published_during_a_rollback_goes_too(
    run_dir: Path, directory: Path, target: TargetWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, model = DrafterStore.reject, load_drafter(run_dir / "drafters/v000001", target)

    def reject(store: DrafterStore, number: int, reason: str) -> None:
        real(store, number, reason)
        if number == 3:
            store.publish(lambda path: save_drafter(model, path, 3, target), {})

    monkeypatch.setattr(DrafterStore, "reject", reject)
    assert roll_back(StoreOptions(run_dir), 1, "x") == [3, 4, 2]


def test_nobody_is_rolled_back_unasked(run: Run, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert "say --yes" in run("rollback", code=2)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, code in (("", 1), ("no", 1), ("y", 0)):
        monkeypatch.setattr("builtins.input", lambda _question, answer=answer: answer)
        run("rollback", code=code)
        assert DrafterStore(run_dir / "drafters").latest() == 3 - (code == 0)


def test_an_export_comes_back_by_import(run: Run, run_dir: Path, target: TargetWeights, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "vllm serve TARGET" in run("export", 2, out)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(
        load_drafter(out, target).fc.weight, load_drafter(run_dir / "drafters/v000002", target).fc.weight
    )
    assert "is there already" in run("export", 2, out, code=2)
    assert "create it first" in run("export", 2, tmp_path / "a/b", code=2)
    assert "there are 1, 2, 3" in run("export", 4, tmp_path / "c", code=2)
    assert "version 4 is the latest" in run("import", out)
    told = json.loads(run("show", 4, "--json"))
    assert (told["parent"], told["state"], told["origin"]) == (3, "latest", f"imported from {out}")
    assert not list(tmp_path.glob(".out*"))


def test_a_first_import_names_its_target(run: Run, directory: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    run("export", 2, out)
    assert "no drafters of kind eagle3" in run("import", out, where=fresh, code=2)
    assert "version 1 is the latest" in run("import", out, "--model", directory, where=fresh)
    other = write_target(tmp_path / "other", seed=5)
    assert "trained for another model" in run("import", out, "--model", other, where=tmp_path / "x", code=2)
    assert "gone: no such directory" in run("import", tmp_path / "gone", where=fresh, code=2)
    assert not list((tmp_path / "x/drafters").glob("v*"))


def spoil_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def spoil(out: Path) -> None:
        tensors = load_file(out / "model.safetensors")
        tensors[name] = change(tensors[name]).clone()
        save_file(tensors, out / "model.safetensors")

    return spoil


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | changes))

    return edit


def as_link(out: Path) -> None:
    (out / "model.safetensors").rename(out.parent / "elsewhere.safetensors")
    (out / "model.safetensors").symlink_to(out.parent / "elsewhere.safetensors")


SPOILT = {
    "a tensor of another shape": (spoil_tensor("fc.weight", lambda t: t[:, 1:]), "has shape"),
    "whole numbers": (spoil_tensor("fc.weight", lambda t: t.int()), "has type"),
    "NaN": (spoil_tensor("fc.weight", lambda t: t * float("nan")), "not finite"),
    "an unsorted vocabulary": (spoil_tensor("d2t", lambda t: t.flip(0) + 5), "d2t and t2d"),
    "another hidden size": (edit_config(target_hidden_size=7), "target_hidden_size is 7"),
    "another target": (edit_config(aurora={"target_fingerprint": "0"}), "trained for another model"),
    "another vocabulary size": (edit_config(draft_vocab_size=255), "shape"),
    "code to run": (edit_config(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "a link": (as_link, "only plain files"),
    "a folder": (lambda out: (out / "more").mkdir(), "only plain files"),
    "pickle": (lambda out: (out / "pytorch_model.bin").write_bytes(b"\x80"), "never pickle"),
    "no weights": (lambda out: (out / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut weights": (lambda out: os.truncate(out / "model.safetensors", 99), "not readable"),
    "no JSON": (lambda out: (out / "config.json").write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_a_server_would_refuse_is_not_imported(how: str, run: Run, run_dir: Path, tmp_path: Path) -> None:
    spoil, said = SPOILT[how]
    out = tmp_path / "out"
    run("export", 2, out)
    spoil(out)
    message = run("import", out, code=2)
    assert said in message
    assert str(out) in message, "not its copy, which is gone"
    assert DrafterStore(run_dir / "drafters").versions() == [1, 2, 3]
    assert not list((run_dir / "drafters").glob(".publish-*"))


def test_an_import_outlives_a_trainer_that_clears_up(
    run: Run, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drafters import intake

    real, calls = intake.check_drafter, []

    def check(directory: Path, *arguments: object) -> None:
        real(directory, *arguments)
        calls.append(directory)
        if len(calls) == 1:
            DrafterStore(run_dir / "drafters").prune(8)

    monkeypatch.setattr(intake, "check_drafter", check)
    run("export", 2, tmp_path / "out")
    assert "version 4" in run("import", tmp_path / "out")
    assert len(calls) == 2


def test_draft_models_are_a_kind_of_their_own(
    run: Run, run_dir: Path, directory: Path, target: TargetWeights, tmp_path: Path
) -> None:
    assert "there are drafters of --kind eagle3" in run("list", "--kind", "model", code=2)
    store = DrafterStore(run_dir / "draft_models")
    first = ensure_draft_model(store, target, SPECULATION)
    model = load_draft_model(first.path, target)
    with torch.no_grad():
        model.norm.weight *= 2
    store.publish(lambda path: save_draft_model(model, path, target, first.path / FROZEN), {"parent": 1})
    found = json.loads(run("diff", 1, 2, "--kind", "model", "--json"))
    assert [t["name"] for t in found["tensors"] if t["relative"]] == ["model.norm.weight"]
    out = tmp_path / "out"
    run("export", 2, out, "--kind", "model")
    run("import", out, "--kind", "model")
    run("import", out, "--kind", "model", "--model", directory, where=tmp_path / "fresh")
    for name, text, said in (
        (INDEX, '{"weight_map": {"x": "../../secret"}}', "which is no file"),
        (VOCABULARY, "[3, 2]", "not ascending"),
    ):
        spoilt = tmp_path / name
        shutil.copytree(out, spoilt)
        (spoilt / name).write_text(text)
        assert said in run("import", spoilt, "--kind", "model", code=2)
    frozen = load_file(out / FROZEN)
    save_file({k: t + 1 for k, t in frozen.items()}, out / FROZEN)
    assert "not the embedding and head" in run("import", out, "--kind", "model", code=2)


@pytest.mark.parametrize("arguments", [("show", 9), ("diff", 1, 9), ("diff", 9, 1)])
def test_a_wrong_number_names_those_that_exist(arguments: tuple[object, ...], run: Run) -> None:
    assert "version 9: not in" in (said := run(*arguments, code=2))
    assert "there are 1, 2, 3" in said
