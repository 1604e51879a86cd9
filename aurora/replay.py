"""`aurora replay`: any drafter and any training policy over recorded requests.

The requests arrive in the order of a data set, `concurrency` at a time, and go through the portfolio that serves live:
the same controller, tables, trainer. Acceptance is exact, because the target's tokens do not depend on the drafter: a
draft is accepted when the recorded target said it. Time is modelled: each step takes what the costs of a live engine
(`aurora bench --json`) say, and training gets `train_share` of it in core-seconds.

A request is drafted for by the version that was live when it arrived. The trainer gets the accepted and rejected
neural drafts as it does live, for the policy gradient; but on rejected paths a recording holds no states of the target,
so there is nothing to distil there.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from aurora import profiling
from aurora.acceptance_profile import AcceptanceProfile
from aurora.clockwork import Clockwork, Live, Outcome, PortfolioSpeculator, PromptLookup, Speculator, Training
from aurora.codec import CODECS
from aurora.config import AuroraConfig, UserError, load_config, require_positive, require_writable
from aurora.options import trainer_settings
from aurora.prompts import read_prompts
from aurora.replay_result import Cell, half_widths, mean_cells, recovery, rows, summarise
from aurora.results import read_rows, write_rows
from aurora.step_costs import read_costs
from aurora.step_time import StepTimeModel
from aurora.trace import TABLE_VERSION

if TYPE_CHECKING:
    from trainer.loop import TrainerLoop
    from trainer.recording import Recording
    from trainer.sequence import Sequence as Recorded

POLICIES = {
    "no_speculation": "decode plainly",
    "prompt_lookup": "the text's own n-grams, 3 drafts whenever 2 to 4 tokens match (vLLM's `ngram`)",
    "static_eagle3": "the drafter given, never trained, k by goodput",
    "online_eagle3": "the drafter given, trained on what is served",
    "ngram_table": "the table over own and served text, k by goodput",
    "online_draft_model": "a small draft model made of the target's layers, trained on what is served",
    "portfolio": "the drafters of --drafters, trained, chosen by goodput",
}
_LEARNING = {"online_eagle3", "online_draft_model", "portfolio"}
_DRAFTERS = {"ngram_table": ("ngram",), "online_draft_model": ("model",)}
_PROFILED = ("static_eagle3", "ngram_table")
_DOMAINS = ("labels", "clusters", "none")


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay and how; `aurora replay` has a flag for each. Raises UserError for values that make no sense."""

    recording: Path
    dataset: str
    policy: str
    costs: Path  # JSON file of `aurora bench --json`
    split: str = "train"
    variant: str | None = None
    limit: int | None = None
    drafter: Path | None = None  # None: made from the target
    draft_vocab: int = 8192
    draft_layers: int = 2  # of the draft model
    drafters: tuple[str, ...] = ("eagle3", "ngram")  # of the policy `portfolio`
    concurrency: int = 4
    k_max: int = 4
    fixed_k: int | None = None  # the same k for all instead of goodput
    train_share: float = 0.15
    codec: str = "compact"  # of the traces that training learns from (`aurora.codec`)
    seed: int = 0
    seeds: int = 1  # replays with this many seeds, from `seed` on; more than one give confidence intervals
    json_file: Path | None = None
    save_drafter: Path | None = None  # new directory for the drafter as trained in the end
    results: Path | None = None  # file of rows (`aurora.results`)
    experiment: str = "replay"  # name of these rows
    sample_drafts: str = "greedy"  # or "probabilistic": sampled from q, for texts that were sampled
    domains: str = "labels"  # what sorts the requests: the data set's labels, clusters of their prompts, or nothing
    settings: tuple[str, ...] = ()  # trainer.KEY=VALUE: how to train
    profile: Path | None = None  # file for what `aurora simulate` needs to know of the drafter

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(f"--policy {self.policy}: no such policy; choose from {', '.join(POLICIES)}")
        if self.codec not in CODECS:
            raise UserError(f"--codec {self.codec}: no such codec; choose from {', '.join(CODECS)}")
        if self.domains not in _DOMAINS:
            raise UserError(f"--domains {self.domains}: choose from {', '.join(_DOMAINS)}")
        require_positive(self, "concurrency", "k_max", "limit", "seeds")
        require_writable("--json", self.json_file)
        require_writable("--results", self.results)
        require_writable("--profile", self.profile)
        if self.profile is not None and self.policy not in _PROFILED:
            raise UserError(f"--profile: {self.policy} has not one drafter to profile; choose {' or '.join(_PROFILED)}")
        if self.save_drafter is not None and not (self.policy in _LEARNING and "eagle3" in _drafters(self)):
            raise UserError(
                f"--save-drafter: {self.policy} trains no EAGLE-3 drafter; choose online_eagle3 or portfolio"
            )
        if self.save_drafter is not None and self.seeds > 1:
            raise UserError(f"--save-drafter: --seeds {self.seeds} trains as many; keep the one of a single seed")
        if self.save_drafter is not None and self.save_drafter.exists():
            raise UserError(f"--save-drafter {self.save_drafter}: it exists; give a new directory")
        unknown = sorted(set(self.drafters) - {"eagle3", "ngram", "model"})
        if unknown or not self.drafters:
            raise UserError(f"--drafters {','.join(self.drafters)}: choose from eagle3, ngram, model")
        if self.sample_drafts not in ("greedy", "probabilistic"):
            raise UserError(f"--sample-drafts {self.sample_drafts}: choose greedy or probabilistic")
        trained = load_config(None, trainer_settings(self.settings)).trainer
        if self.sample_drafts != "greedy" and trained.rl.weight:
            raise UserError(
                "--sample-drafts probabilistic: replay does not log q for trainer.rl; leave one of them out"
            )
        if not 0 <= self.train_share <= 8:
            raise UserError(f"--train-share {self.train_share}: must be between 0 and 8 core-seconds a second")


def run(options: ReplayOptions) -> int:
    """Replay and report. Raises UserError for what the user can mend."""
    from trainer.recording import Recording

    recording = Recording(options.recording.expanduser())
    costs = read_costs(options.costs, "model" in _drafters(options))
    known = read_rows(options.results) if options.results is not None else []
    keys = _order(options, recording)
    plain = _replay(
        "no_speculation", Arrivals(options, recording, keys), Clockwork(costs, Speculator(), options.concurrency)
    )
    seeds = range(options.seed, options.seed + options.seeds)
    trials = [_trial(replace(options, seed=seed), recording, keys, costs) for seed in seeds]
    cells = [list(summarise(trial.outcomes, plain)) for trial in trials]
    _show(options, cells, trials)
    if options.results is not None:
        recovered = [recovery(trial.outcomes) for trial in trials]
        write_rows(options.results, rows(options.experiment, options.policy, cells, recovered, known))
    if options.json_file is not None:
        result = {
            "policy": options.policy,
            "options": {name: str(value) for name, value in asdict(options).items()},
            "cells": [asdict(cell) for cell in mean_cells(cells)],
            "training_core_s": trials[0].training_s,
            "requests": [asdict(outcome) for outcome in trials[0].outcomes],
        }
        options.json_file.write_text(json.dumps(result, indent=1))
    if options.profile is not None:
        _profile(options, recording, keys).write(options.profile)
    return 0


def _profile(options: ReplayOptions, recording: "Recording", keys: list[str]) -> AcceptanceProfile:
    requests = (recording.read(key) for key in keys)
    with tempfile.TemporaryDirectory(prefix="aurora-replay-") as scratch:
        config = _config(options, recording, Path(scratch))
        if options.policy == "ngram_table":
            places = profiling.table_places(config.speculation.ngram_mib << 20, options.k_max)
            return profiling.profile("ngram", options.k_max, requests, places)
        _, _, draft = policy_of(options, recording, Path(scratch))
        assert draft is not None, "the policy has a neural drafter"
        places = profiling.neural_places(lambda request: draft(request).neural, options.k_max)
        return profiling.profile("eagle3", options.k_max, requests, places)


@dataclass(frozen=True)
class _Trial:
    """One replay with one seed."""

    outcomes: list[Outcome]
    training_s: float  # core-seconds


def _trial(options: ReplayOptions, recording: "Recording", keys: list[str], costs: StepTimeModel) -> _Trial:
    with tempfile.TemporaryDirectory(prefix="aurora-replay-") as scratch:
        speculator, training, draft = policy_of(options, recording, Path(scratch))
        clockwork = Clockwork(costs, speculator, options.concurrency)
        outcomes = _replay(options.policy, Arrivals(options, recording, keys, draft), clockwork)
        if options.save_drafter is not None and training is not None:
            training.save(options.save_drafter)
    return _Trial(outcomes, training.spent_s if training is not None else 0.0)


def _drafters(options: ReplayOptions) -> tuple[str, ...]:
    return options.drafters if options.policy == "portfolio" else _DRAFTERS.get(options.policy, ("eagle3",))


def _order(options: ReplayOptions, recording: "Recording") -> list[str]:
    """Keys of the recorded requests in the data set's order; conversations that were not recorded are passed over."""
    from trainer.recording import request_key

    conversations = read_prompts(options.dataset, split=options.split, variant=options.variant)
    keys = [request_key(c.turns, turn) for c in conversations for turn in range(len(c.turns))]
    present = [key for key in keys if key in recording]
    if not present:
        raise UserError(f"{options.recording} holds no request of {options.dataset}: record it with `aurora record`")
    return present[: options.limit]


@dataclass(frozen=True, eq=False)
class _Drafted:
    """What the drafters with weights draft along one request's text, [starts, k] each; None: there is no such."""

    neural: Any = None
    model: Any = None
    version: int = TABLE_VERSION  # of the neural drafter


_Draft = Callable[["Recorded"], _Drafted]


def policy_of(
    options: ReplayOptions, recording: "Recording", run_dir: Path
) -> tuple[Speculator, Training | None, _Draft | None]:
    """What drafts, what trains beside it, and what the neural drafter drafts along a request that arrives."""
    if options.policy == "no_speculation":
        return Speculator(), None, None
    if options.policy == "prompt_lookup":
        return PromptLookup(), None, None
    from aurora.default_model import model_directory, resolve_model
    from serve.portfolio import Portfolio

    config = _config(options, recording, run_dir)
    portfolio = Portfolio(config.speculation, options.k_max)
    if set(config.speculation.drafters) == {"ngram"}:
        return PortfolioSpeculator(portfolio, options.k_max), None, None
    model_dir = model_directory(resolve_model(config.model, config.cache_dir))
    speculator = PortfolioSpeculator(portfolio, options.k_max)
    from trainer.loop import TrainerLoop

    loop = TrainerLoop(config, model_dir, clock=lambda: speculator.now_s)
    training = Training(loop, options.train_share, portfolio.controller, options.codec)
    if options.policy in _LEARNING:
        speculator.training = training
    return speculator, training, _drafting(options, recording, loop, model_dir)


def _drafting(options: ReplayOptions, recording: "Recording", loop: "TrainerLoop", model_dir: Path) -> _Draft:
    """What the live drafters draft along a request's text, as far as verification accepts it."""
    from trainer.text import greedy_text

    neural = _neural(options, recording, loop, model_dir) if "eagle3" in _drafters(options) else None
    second = loop.draft_model

    def draft(request: "Recorded") -> _Drafted:
        return _Drafted(
            neural=neural(request) if neural is not None else None,
            model=greedy_text(second.live, request, options.k_max) if second is not None else None,
            version=loop.version,
        )

    return draft


def _neural(
    options: ReplayOptions, recording: "Recording", loop: "TrainerLoop", model_dir: Path
) -> Callable[["Recorded"], Any]:
    from trainer.verify import Sampling, greedy_drafts, sampled_drafts, text_law

    how = recording.manifest
    if options.sample_drafts == "greedy" or how.temperature == 0:
        return lambda request: greedy_drafts(loop.live, request, options.k_max)
    import torch

    from drafters import TargetWeights

    head = TargetWeights.load(model_dir).lm_head
    sampling = Sampling(how.temperature, how.top_p, how.top_k)
    generator = torch.Generator().manual_seed(options.seed)

    def draft(request: "Recorded") -> Any:
        law = text_law(request, head, loop.live.draft_ids, sampling)
        return sampled_drafts(loop.live, request, options.k_max, law, temperature=how.temperature, generator=generator)

    return draft


def _config(options: ReplayOptions, recording: "Recording", run_dir: Path) -> AuroraConfig:
    speculation: dict[str, Any] = {"k_max": options.k_max, "drafters": _drafters(options), "drafter": options.drafter}
    speculation |= {"draft_vocab": options.draft_vocab, "fixed_k": options.fixed_k}
    speculation |= {"draft_layers": options.draft_layers, "cluster_domains": options.domains == "clusters"}
    overrides: dict[str, Any] = {"model": recording.manifest.model, "run_dir": run_dir, "trainer.seed": options.seed}
    overrides |= {f"speculation.{name}": value for name, value in speculation.items()}
    return load_config(None, overrides | trainer_settings(options.settings))


@dataclass
class Arrivals:
    """The requests of a replay, one after the other as the batch has room; `outcomes` in the order of arrival."""

    options: ReplayOptions
    recording: "Recording"
    keys: list[str]
    draft: _Draft | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    def __iter__(self) -> Iterator[Live]:
        for number, key in enumerate(self.keys):
            request = self.recording.read(key)
            told = request.domain if self.options.domains == "labels" else ""
            drafted = self.draft(request) if self.draft is not None else _Drafted()
            self.outcomes.append(outcome := Outcome(request.domain))
            yield Live(f"{number}", request, drafted.neural, outcome, told, drafted.version, drafted.model)


def _replay(name: str, arrivals: Arrivals, clockwork: Clockwork) -> list[Outcome]:
    """Outcomes in the order in which the requests arrived."""
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=len(arrivals.keys))
        for _ in clockwork.run(arrivals):
            progress.advance(task)
    return arrivals.outcomes


def _show(options: ReplayOptions, cells: list[list[Cell]], trials: list[_Trial]) -> None:
    table = Table("requests", "", "acceptance length", "rate", "tokens/step", "tokens/s", "over no speculation")
    shown = ("acceptance_length", "acceptance_rate", "tokens_per_step", "tokens_per_s", "speedup")
    for cell, width in zip(mean_cells(cells), half_widths(cells), strict=True):
        numbers = (f"{getattr(cell, name):.2f}" + (f" ±{width[name]:.2f}" if width else "") for name in shown)
        table.add_row(cell.domain, str(cell.requests), *numbers)
    spent_s = sum(trial.training_s for trial in trials) / len(trials)
    seeds = f", {len(trials)} seeds, ± 95 %" if len(trials) > 1 else ""
    Console().print(f"{options.policy}: {POLICIES[options.policy]}; {spent_s:.0f} core-seconds of training{seeds}")
    Console().print(table)
