"""Records with nothing amiss, of which a test changes what it is about."""

from __future__ import annotations

import math
from typing import Any

from tailrace.harness.records.facts import TrialFacts
from tailrace.harness.records.record import Record
from tailrace.harness.records.store import TrialFolder
from tailrace.harness.records.summary import Accounting, CellSummary, ResourceUse, TrialSummary

_NAMES = {
    "cell": "triton--calm",
    "adapter": "triton",
    "scenario": "calm",
    "workload": "emulated",
    "trace": "steady",
    "device": "emulated",
    "devices": 1,
    "protocol": "http",
    "slo_ms": 100.0,
}


def facts(**changes: Any) -> TrialFacts:
    """Of a trial that is done."""
    content = {
        **_NAMES,
        "id": "triton--calm--1",
        "number": 1,
        "seed": 1,
        "state": "done",
        "span_s": 10.0,
        "cpu_count": 2,
    }
    return TrialFacts.model_validate({**content, **changes})


def change(trial: TrialFolder, **changes: Any) -> None:
    """Write a trial's facts anew, with these changed."""
    trial.write(TrialFacts.model_validate({**trial.facts.dump(), **changes}))
    trial.__dict__.pop("facts", None)


def trial_summary(**changes: Any) -> TrialSummary:
    """Of a trial of 1000 arrivals."""
    return TrialSummary.model_validate({**_blank(TrialSummary), **_NAMES, **_TRIAL, **changes})


def cell_summary(**changes: Any) -> CellSummary:
    """Of a cell of such trials."""
    return CellSummary.model_validate(
        {**_blank(CellSummary), **_NAMES, **_COUNTS, "trials": 1, "reasons": [], **changes}
    )


def _blank(model: type[Record]) -> dict[str, Any]:
    """Nothing known, and nothing there."""
    blank: dict[str, Any] = dict.fromkeys(model.model_fields)
    return {**blank, "tuning": {}, "left_out": {}, "stages": [], "models": [], "emulated": True, "nodes": 1,
            "supervision": "none", "verdict": "VALID", "send_lag_p99_ms": 0.1}  # fmt: skip


_COUNTS = {"arrivals": 1000, "good": 1000, "ok": 1000} | dict.fromkeys(
    ("errors", "shed", "timeouts", "connection_errors", "dropped"), 0
)
_TRIAL = {
    **_COUNTS,
    **ResourceUse().model_dump(),
    **dict.fromkeys(("p50_ok_ms", "p99_ok_ms", "p50_service_ms", "p99_service_ms"), math.nan),
    **dict.fromkeys(("send_lag_p50_ms", "send_lag_max_ms", "effective_arrivals"), math.nan),
    **dict.fromkeys(("offered_rps", "throughput_rps", "goodput_rps", "goodput_rps_per_device"), 100.0),
    "trial": "triton--calm--1",
    "number": 1,
    "state": "done",
    "span_s": 10.0,
    "slo_attainment": 1.0,
    "p99_more_needed": 0,
    "gpus": [],
    "faults": [],
    "reasons": [],
    "accounting": Accounting(
        arrivals=1000,
        outcomes={},
        closed=True,
        executed=None,
        unanswered_work=None,
        done_twice=None,
        server_ok=None,
        server_ok_less_client_ok=None,
    ),
}
