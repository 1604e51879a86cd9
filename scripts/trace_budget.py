"""What traces and training need at 10, 100 and 1,000 replicas, what saturates first, and what sampling rate is left.

python scripts/trace_budget.py TRACE --profile table.safetensors

A replica of each machine of `docs/machines` is simulated with the goodput rule when requests never run out: nothing
sends more traces. Encoding and decoding are timed here, in CPU time of one core. `aurora.trace_budget` does the rest.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rate_sweep import Machine, fitting, saturated
from rich.console import Console
from rich.table import Table

from aurora import batching, speculation_rules
from aurora.acceptance_profile import AcceptanceProfile, read_profile
from aurora.arrivals import ArrivalTrace, read_arrivals
from aurora.codec import CODECS, TAPS, TraceCodec
from aurora.config import CaptureConfig, UserError
from aurora.results import Row, write_rows
from aurora.simulate import SimulateOptions
from aurora.trace_budget import Budget, Shares, Speeds, Traffic, budget, train_rows_per_s

REPLICAS = (10, 100, 1000)
_MACHINES = Path(__file__).resolve().parent.parent / "docs" / "machines"
_ROWS, _ROUNDS = 256, 7  # timed at once; the fastest round counts
_DRAFTER_8B = 327_172_096  # trained parameters: `aurora.model_size.drafter_parameters`, for Llama-3.1-8B


@dataclass(frozen=True)
class Host:
    """A machine with its target's width and what a trainer there trains on."""

    machine: str
    hidden_size: int
    train_rows_per_s: float
    source: str  # of the latter


HOSTS = (
    Host("cpu-2-cores-smollm2-135m", 576, 553, "measured, one core (docs/results.md, The trainer's step)"),
    Host("a100-80g-llama-3-8b", 4096, train_rows_per_s(_DRAFTER_8B, 3, 0.1 * 312e12), "assumed: 10 % of 312 TFLOP/s"),
    Host("h100-80g-llama-3.1-8b", 4096, train_rows_per_s(_DRAFTER_8B, 3, 0.1 * 989e12), "assumed: 10 % of 989 TFLOP/s"),
)


def traffic(arrivals: ArrivalTrace, drafts: AcceptanceProfile, machine: Machine, requests: int) -> Traffic:
    """Of a replica that never runs out of requests."""
    options = SimulateOptions(trace=Path(), profile=Path(), costs=Path(), kv_tokens=machine.kv_tokens)
    trace = fitting(arrivals, machine).repeated(requests)
    state = saturated(trace, drafts, machine, options, speculation_rules.GOODPUT)
    tokens, seconds = int(trace.output.sum()), float(state.finish.max())
    kept = np.minimum(trace.prompt, CaptureConfig().prompt_tokens)
    drafted, accepted = (state.counts[place] / tokens for place in (batching.DRAFTED, batching.ACCEPTED))
    return Traffic(tokens / seconds, len(trace) / seconds, float(kept.mean()), float(drafted), float(accepted))


def codec_rows_per_s(codec: TraceCodec, hidden_size: int) -> tuple[float, float]:
    """Rows that a core encodes and decodes in a second."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((_ROWS, hidden_size * (1 + TAPS)), np.float32)
    states = (drawn.view(np.uint32) >> 16).astype(np.uint16)
    hidden, aux = np.ascontiguousarray(states[:, :hidden_size]), np.ascontiguousarray(states[:, hidden_size:])
    packed = codec.hidden.encode(hidden), codec.encode_aux(aux)

    def encode() -> None:
        codec.hidden.encode(hidden)
        codec.encode_aux(aux)

    def decode() -> None:
        codec.hidden.decode(packed[0], hidden_size)
        codec.decode_aux(packed[1], hidden_size)

    return _ROWS / _fastest(encode), _ROWS / _fastest(decode)


def _fastest(work: Callable[[], None]) -> float:
    """CPU seconds of the fastest round."""
    found = []
    for _ in range(_ROUNDS):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def rows(host: Host, speeds: Speeds, budgets: list[Budget]) -> Iterator[Row]:
    command = shlex.join(["python", *sys.argv])
    for name in ("encode_rows_per_s", "decode_rows_per_s", "train_rows_per_s", "link_bytes_per_s"):
        yield Row("trace_budget", host.machine, "inputs", name, getattr(speeds, name), None, command)
    for each in budgets:
        place = "trace_budget", host.machine, f"{each.replicas} replicas"
        yield Row(*place, "rows_per_s", each.rows_per_s, None, command)
        yield Row(*place, "bytes_per_s", each.bytes_per_s, None, command)
        for name, rate in each.rates.items():
            yield Row(*place, f"load_{name}", each.loads[name], None, command)
            yield Row(*place, f"rate_{name}", rate, None, command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, metavar="TRACE")
    parser.add_argument("--profile", type=Path, required=True, help="of `aurora replay`")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--codec", choices=sorted(CODECS), default="compact")
    parser.add_argument("--link-gbit", type=float, default=10, help="a second, into the trainer's node")
    parser.add_argument("--results", type=Path, help="put rows of results there")
    options = parser.parse_args()
    arrivals, drafts, codec = read_arrivals(options.trace), read_profile(options.profile), CODECS[options.codec]
    timed = {size: codec_rows_per_s(codec, size) for size in sorted({host.hidden_size for host in HOSTS})}
    found = []
    for host in HOSTS:
        machine = Machine.read(_MACHINES / f"{host.machine}.json")
        speeds = Speeds(*timed[host.hidden_size], host.train_rows_per_s, options.link_gbit * 1e9 / 8)
        each = traffic(arrivals, drafts, machine, options.requests)
        of_one = each.bytes_per_s(codec, host.hidden_size)
        budgets = [budget(count, each, of_one, speeds, Shares()) for count in REPLICAS]
        found.append((host, speeds, each, of_one, budgets))
        if options.results is not None:
            write_rows(options.results, rows(host, speeds, budgets))
    _show(found)


def _show(found: list[tuple[Host, Speeds, Traffic, float, list[Budget]]]) -> None:
    console = Console(width=200)
    inputs = Table("machine", "tokens/s", "rows/s", "kB/s", "encode rows/s", "decode rows/s", "train rows/s", "source")
    table = Table("machine", "replicas", "rows/s", "MB/s", "encode", "link", "decode", "train", "first", "sampled")
    for host, speeds, each, of_one, budgets in found:
        codec = (f"{speeds.encode_rows_per_s:.0f}", f"{speeds.decode_rows_per_s:.0f}")
        numbers = (f"{each.tokens_per_s:.0f}", f"{each.rows:.0f}", f"{of_one / 1e3:.0f}")
        inputs.add_row(host.machine, *numbers, *codec, f"{speeds.train_rows_per_s:.0f}", host.source)
        for one in budgets:
            loads = [f"{load:.3g}" for load in one.loads.values()]
            amount = (str(one.replicas), f"{one.rows_per_s:.0f}", f"{one.bytes_per_s / 1e6:.1f}")
            table.add_row(host.machine, *amount, *loads, one.first, f"{one.rate:.2g}")
    console.print(inputs)
    console.print(table)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"trace_budget: error: {error}")
