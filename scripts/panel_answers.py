"""What a Prometheus answers to each panel of the Grafana dashboard, over the last minutes: series and last value.

scripts/panel_answers.py http://127.0.0.1:9090 --minutes 5
"""

import argparse
import time

import httpx

from aurora import grafana

_STEP_S = 15
_RATE = "1m"  # what Grafana would put in for the interval of a rate, with Prometheus asking every 15 s


def main() -> None:
    """Ask and print a Markdown table. An expression that Prometheus refuses ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--minutes", type=float, default=5)
    given = parser.parse_args()
    print("| row | panel | series | last values |\n|---|---|---|---|")
    for row in grafana.ROWS:
        for panel in row.panels:
            found = [one for asked in panel.targets.values() for one in series(given.url, asked, given.minutes)]
            last = ", ".join(f"{float(one['values'][-1][1]):.4g}" for one in found[:6])
            print(f"| {row.title} | {panel.title} | {len(found)} | {last}{' ...' if len(found) > 6 else ''} |")


def series(url: str, expression: str, minutes: float) -> list[dict[str, list[tuple[float, str]]]]:
    """The series of an expression, as Grafana asks for them."""
    asked = expression.replace("$__rate_interval", _RATE).replace("$instance", ".*")
    now_s = time.time()
    query = {"query": asked, "start": now_s - 60 * minutes, "end": now_s, "step": _STEP_S}
    answer = httpx.get(f"{url}/api/v1/query_range", params=query, timeout=30).raise_for_status()
    found: list[dict[str, list[tuple[float, str]]]] = answer.json()["data"]["result"]
    return found


if __name__ == "__main__":
    main()
