"""Alarms for what no rule puts right by itself: a drafter that is never right, and speculation that is silently off.

Both are lossless, so that nobody notices but by the speed. A zeroed or scrambled drafter drafts the same token over and
over; the goodput rule then leaves it out, which looks like thrift. A seam that vLLM moved may leave requests undrafted.
"""

from dataclasses import dataclass, field

from aurora.metrics import EngineReport
from aurora.trace import TABLE_VERSION

NEVER_RIGHT, OFF = "drafter_never_right", "speculation_off"
KINDS = (NEVER_RIGHT, OFF)
UNSAVED = "training_unsaved"  # raised by what the trainer says of its disk (`serve.load`)
DRAFTS = 1000  # without one right first token. The untrained drafter has about 30
STEPS = 2000  # without a draft, though prompts were read: exploration alone makes some every 400 or so


@dataclass
class SpeculationAlarms:
    """What is wrong, by its kind; tell it of every report. For servers with a neural drafter that may draft."""

    raised: dict[str, str] = field(default_factory=dict)  # kind -> why
    _version: int = 0
    _drafts: int = 0  # since one was right, of this version
    _steps: int = 0  # since there was a draft
    _prompts: int = 0  # prompt tokens read since then

    def observe(self, report: EngineReport) -> None:
        """Count a report's drafts."""
        if report.drafter_version != self._version:
            self._version, self._drafts = report.drafter_version, 0
        drafts, right = report.first_drafts.get(self._version, (0, 0))
        self._drafts = 0 if right else self._drafts + drafts
        neural = any(count for version, count in report.drafted_tokens.items() if version != TABLE_VERSION)
        if drafts or neural:
            self._steps = self._prompts = 0
        else:
            self._steps += report.steps
            self._prompts += report.prefill_tokens
        self._say(NEVER_RIGHT, self._drafts >= DRAFTS, f"{self._drafts} drafts of version {self._version}, none right")
        off = self._steps >= STEPS and self._prompts > 0
        self._say(OFF, off, f"{self._steps} steps without a draft of the neural drafter")

    def _say(self, kind: str, wrong: bool, why: str) -> None:
        if wrong:
            self.raised[kind] = why
        else:
            self.raised.pop(kind, None)
