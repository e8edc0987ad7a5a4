"""What a run tells while it runs; the command line shows it, tests and scripts may ignore it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tailrace.harness.plan.cells import TrialPlan
    from tailrace.harness.records.summary import TrialSummary
    from tailrace.harness.replay.driver import Progress


class Observer:
    """Every method may be overridden; this one says nothing."""

    def note(self, text: str) -> None:
        """Something that happened before or between trials (an environment being built, a leftover removed)."""

    def trial_begins(self, plan: TrialPlan, position: int, count: int, duration_s: float) -> None:
        """A trial starts; ``duration_s`` is how long its schedule lasts."""

    def stage(self, plan: TrialPlan, name: str) -> None:
        """A trial enters a stage of its life: deploy, verify, warm up, measure, drained, stop."""

    def progress(self, plan: TrialPlan, progress: Progress) -> None:
        """The load generator's live figures. A :class:`TrialPrunedError` that is raised here ends the trial, in order."""

    def trial_ends(self, plan: TrialPlan, summary: TrialSummary) -> None:
        """A trial is over and analysed."""
