"""`make soak`: an hour of mixed traffic with swaps, rollbacks, clients that leave and processes killed.

The first third has the faults: every process of the server's is killed once, and a broken drafter is published. From
then on nothing is killed; traffic, swaps and rollbacks go on, and memory, open files, KV blocks and the store must
stand still. Writes `soak.md` (a table), `soak.png` and `soak.json` to `--out`; exit code 1 if something grew, failed
that should not, or was lost.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import matplotlib as mpl
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import Progress

from aurora.config import UserError
from aurora.store import DrafterStore
from tests.faults.test_drafters import changed
from tests.faults.test_survival import BESIDE, FLAGS, SERVING, healthy, kill
from tests.faults.traffic import CUT_OFF, NOBODY, Traffic, mixed
from tests.integration.process import START_LIMIT_S, ServedModel, random_prompts
from tests.integration.tiny_model import write_model
from tests.waiting import wait_until

ROLES = {"server": "ray::Server", "engine": "VLLM::EngineCore", "trainer": "ray::Trainer", "reporter": "ray::Reporter"}
EVERY_S = 5.0
GROWTH = 0.05  # of memory and open files over the quiet part that still counts as standing still
_FLAGS = (*FLAGS, "--fixed-k=2", "--publish-interval=20", "--set=trainer.keep_versions=5", "--set=trainer.replay_mib=8")


@dataclass
class Soak:
    """A server, what is measured of it, and what happened."""

    server: ServedModel
    minutes: float
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))  # (s, value)
    events: list[tuple[float, str]] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.began_s

    @property
    def quiet_from_s(self) -> float:
        """When the faults are over and what grew by them has had time to settle."""
        return self.minutes * 60 * 0.45

    def happened(self, what: str) -> None:
        self.events.append((round(self.now_s, 1), what))

    def sample(self, traffic: Traffic) -> None:
        """Measure everything once; a process that is being restarted is left out."""
        for process in self.server.processes():
            try:
                role = next((r for r, name in ROLES.items() if process.name().startswith(name[:15])), None)
                if role is not None:
                    self._add(f"{role}: memory, MiB", process.memory_info().rss / (1 << 20))
                    self._add(f"{role}: open files", process.num_fds())
            except psutil.Error:
                continue
        store = self.server.run_dir / "drafters"
        sizes = (file.stat().st_size for file in store.rglob("*") if file.is_file())
        try:
            self._add("store, MiB", sum(sizes) / (1 << 20))
        except FileNotFoundError:  # pruned meanwhile
            return
        self._add("requests answered", traffic.outcomes[200])
        try:
            self._add("KV cache in use", self.server.metric("vllm:kv_cache_usage_perc"))
            self._add("drafter version", self.server.metric("aurora_drafter_version"))
        except OSError:
            return

    def _add(self, name: str, value: float) -> None:
        self.samples[name].append((self.now_s, value))

    def quiet(self, name: str) -> tuple[float, float]:
        """Median of the first and of the last fifth of the quiet part."""
        values = [value for at, value in self.samples[name] if at >= self.quiet_from_s]
        if not values:
            raise AssertionError(f"{name} was never measured in the quiet part")
        fifth = max(len(values) // 5, 1)
        return float(np.median(values[:fifth])), float(np.median(values[-fifth:]))


def plan(minutes: float) -> list[tuple[float, str]]:
    """(second, what) in order: faults in the first third, worse drafters all the time."""
    end = minutes * 60
    kills = [*BESIDE, *SERVING]
    faults = [(end * (i + 1) / (3 * len(kills) + 3), kind) for i, kind in enumerate(kills)]
    worse = [(at, "worse drafter") for at in np.arange(end * 0.12, end * 0.95, end * 0.09)]
    return sorted([*faults, *worse, (end * 0.3, "broken drafter")])


def inject(soak: Soak, what: str) -> None:
    """Let one thing of the plan happen."""
    store = DrafterStore(soak.server.run_dir / "drafters")
    latest = store.latest()
    assert latest is not None
    source = store.read(latest).path
    soak.happened(what)
    if what == "worse drafter":
        store.publish(changed(source, _scramble), {"parent": latest})
    elif what == "broken drafter":
        store.publish(changed(source, lambda w: w["fc.weight"].fill_(float("nan"))), {"parent": latest})
    else:
        kill(soak.server, (BESIDE | SERVING)[what])
        if what in SERVING:
            wait_until(lambda: not healthy(soak.server), 60, "the server is gone")
            wait_until(lambda: healthy(soak.server), START_LIMIT_S, "the server is back")
            soak.happened(f"{what} is back")


def _scramble(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"].copy_(weights["lm_head.weight"][torch.randperm(len(weights["lm_head.weight"]))])


def run(soak: Soak) -> Traffic:
    """Send traffic and let things happen until the time is over."""
    todo = plan(soak.minutes)
    with (
        Traffic(soak.server.url, mixed(soak.server.model_name()), clients=4, leaving=0.1) as traffic,
        Progress(console=Console(stderr=True)) as progress,
    ):
        shown = progress.add_task("soak", total=soak.minutes * 60)
        soak.began_s = time.monotonic()
        while soak.now_s < soak.minutes * 60:
            while todo and todo[0][0] <= soak.now_s:
                inject(soak, todo.pop(0)[1])
            soak.sample(traffic)
            progress.update(shown, completed=soak.now_s)
            time.sleep(EVERY_S)
    return traffic


def verdicts(soak: Soak, traffic: Traffic, same_text: bool) -> list[tuple[str, str, bool]]:
    """(what, found, whether that is as promised)."""
    rows = []
    for name in sorted(soak.samples):
        if name.endswith(("MiB", "open files")):
            first, last = soak.quiet(name)
            rows.append((name, f"{first:.0f} -> {last:.0f}", last <= first * (1 + GROWTH) + 1))
    counters = {kind: soak.server.metric(f"aurora_{kind}_total") for kind in ("swaps", "rollbacks", "swap_failures")}
    store = DrafterStore(soak.server.run_dir / "drafters")
    versions, highest = store.versions(), max(store.versions())
    for number in versions:
        store.verify(number)
    wait_until(lambda: soak.server.metric("vllm:num_requests_running") == 0, 60, "no request is open")
    blocks = soak.server.metric("vllm:kv_cache_usage_perc")
    odd = {str(k): v for k, v in traffic.outcomes.items() if k not in (200, "left", 503, NOBODY, *CUT_OFF)}
    cut = sum(traffic.outcomes[how] for how in CUT_OFF)
    return [
        *rows,
        ("KV cache in use at the end", f"{blocks:.3f}", blocks == 0),
        ("requests answered", str(traffic.outcomes[200]), traffic.outcomes[200] > 0),
        ("clients that left in the middle", str(traffic.outcomes["left"]), True),
        ("answered 503 during restarts", str(traffic.outcomes[503]), True),
        ("found nobody, before the launcher stood in", str(traffic.outcomes[NOBODY]), True),
        ("cut off by a kill", str(cut), cut <= len(SERVING) * traffic.clients),
        ("other failures", json.dumps(odd), not odd),
        ("versions published, kept and whole", f"{highest}, {len(versions)}", len(versions) <= highest),
        *(
            (f"{name.replace('_', ' ')} since the last restart", f"{value:.0f}", True)
            for name, value in counters.items()
        ),
        ("worse drafters taken back", f"{counters['rollbacks']:.0f}", counters["rollbacks"] >= 1),
        ("the target's greedy text as at the start", "yes" if same_text else "no", same_text),
    ]


def draw(soak: Soak, file: Path) -> None:
    """Memory, open files, store, and how the versions went, over the minutes."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    groups = ["memory, MiB", "open files", "store, MiB", "drafter version"]
    figure, axes = plt.subplots(len(groups), 1, figsize=(10, 11), sharex=True, layout="constrained")
    for axis, group in zip(axes, groups, strict=True):
        for name in sorted(n for n in soak.samples if n.endswith(group)):
            at, values = np.array(soak.samples[name]).T
            axis.plot(at / 60, values, label=name.split(":")[0])
        for at, what in soak.events:
            axis.axvline(at / 60, color="tab:red" if what in BESIDE | SERVING else "lightgray", lw=0.8, zorder=0)
        axis.set_ylabel(group)
        axis.set_ylim(bottom=0)
        axis.legend(loc="lower right", fontsize=8)
    axes[-1].set_xlabel("minutes (red: a process killed; grey: a worse or broken drafter, a server that is back)")
    figure.savefig(file, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("soak"))
    options = parser.parse_args()
    if options.minutes < 8:
        raise UserError(f"--minutes {options.minutes:g}: restarts alone take five; give 8 or more")
    options.out.mkdir(parents=True, exist_ok=True)
    server = ServedModel(write_model(Path(mkdtemp())), Path(mkdtemp()) / "run", *_FLAGS)
    try:
        server.wait_ready(START_LIMIT_S)
        server.serve_until_version(2)
        prompts = random_prompts(8)
        expected = server.answers(prompts)
        soak = Soak(server, options.minutes)
        traffic = run(soak)
        rows = verdicts(soak, traffic, server.answers(prompts) == expected)
    finally:
        code = server.stop()
    rows.append(("exit code", str(code), code == 0))
    table = ["| what | found | as promised |", "|---|---|---|"]
    table += [f"| {what} | {found} | {'yes' if well else '**no**'} |" for what, found, well in rows]
    (options.out / "soak.md").write_text("\n".join(table) + "\n")
    record: dict[str, Any] = {"events": soak.events, "samples": soak.samples, "rows": rows}
    (options.out / "soak.json").write_text(json.dumps(record))
    draw(soak, options.out / "soak.png")
    print("\n".join(table))
    return int(not all(well for _, _, well in rows))


if __name__ == "__main__":
    sys.exit(main())
