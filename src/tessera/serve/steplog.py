"""One log line per step that computes prompts, and one every so many steps of decoding, in the words of SGLang's logs.

`#running-req` counts the sequences that decode beside the prompts of the step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tessera.core.messages import StepReport

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Since:
    """What a data-parallel rank did since its last line about decoding."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class StepLog:
    """Writes the lines. `interval`: steps of decoding between two lines of a data-parallel rank; throughput is that of
    the rank, over the steps between them."""

    def __init__(self, interval: int, num_dp: int = 1) -> None:
        self._interval = interval
        self._many = num_dp > 1
        self._since = [Since() for _ in range(num_dp)]

    def __call__(self, report: StepReport) -> None:
        """Takes note of a step."""
        if report.num_new_seq:
            self._prefill(report)
        if not report.num_output_token:
            return
        since = self._since[report.dp_rank]
        since.tokens += report.num_output_token
        since.seconds += report.seconds
        if not report.num_new_seq:
            since.steps += 1
            if since.steps == self._interval:
                self._decode(report, since.tokens / max(since.seconds, 1e-9))
                self._since[report.dp_rank] = Since()

    def _prefill(self, report: StepReport) -> None:
        beside = max(report.num_running - report.num_new_seq, 0)
        log.info(
            "%sPrefill batch. #new-seq: %d, #new-token: %d, #cached-token: %d, %s, #running-req: %d, #queue-req: %d, "
            "kind: %s",
            self._rank(report),
            report.num_new_seq,
            report.num_new_token,
            report.num_cached_token,
            usage(report),
            beside,
            report.num_queued,
            report.label,
        )

    def _decode(self, report: StepReport, throughput: float) -> None:
        log.info(
            "%sDecode batch. #running-req: %d, %s, gen throughput (token/s): %.2f, #queue-req: %d",
            self._rank(report),
            report.num_running,
            usage(report),
            throughput,
            report.num_queued,
        )

    def _rank(self, report: StepReport) -> str:
        return f"DP{report.dp_rank} " if self._many else ""


def usage(report: StepReport) -> str:
    """Shares of the pools that sequences hold."""
    held = report.num_pages_used - report.num_cached_pages
    text = f"token usage: {held / max(report.num_pages, 1):.2f}"
    return f"{text}, slot usage: {report.num_slots_used / report.num_slots:.2f}" if report.num_slots else text
