"""The contract suite catches those who break the contract: an adapter that lies about all it can, held to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
LIAR = """
import itertools
from pathlib import Path
from tailrace_plain.adapter import Plain, PlainDeployment
from tailrace.harness.contract.adapter import MetricSample, Replica, Tuning

LEFT = Path({left!r})


class LiarDeployment(PlainDeployment):
    count = itertools.count()

    def claims_ready(self):
        return True

    def health(self):
        return True

    def applied(self):
        return {{"replicas": 5}}

    def replicas(self):
        return [Replica("0", "alpha", self.process), Replica("1", "alpha", self.process)]

    def scrape(self):
        return [MetricSample("requests_ok_total", 1000.0 * next(self.count), "alpha")]

    def scale(self, replicas):
        pass

    def check_alive(self):
        pass

    def stop(self, grace_s=10.0):
        super().stop(grace_s)
        LEFT.write_text("")


class Liar(Plain):
    name = "liar"
    deployment_type = LiarDeployment
    start_timeout_s = 8.0
    knobs = {{"replicas": "nowhere", "max_batch": "nowhere", "queue_limit": "nowhere"}}
    refused = dict.fromkeys(set(Tuning.model_fields) - set(knobs), "no")

    @property
    def requirements(self):
        return Path(__import__("tailrace_plain").__file__).parent / "requirements.txt"

    @property
    def folder(self):
        return Path(__import__("tailrace_plain").__file__).parent

    def deploy(self, request, host):
        deployment = super().deploy(request, host)
        deployment.__class__ = LiarDeployment
        return deployment


ADAPTER = Liar()
"""
CAUGHT = {
    "test_ready_is_not_claimed_before_a_right_answer",
    "test_the_server_reports_the_configuration_that_was_rendered",
    "test_batches_are_as_large_as_asked_and_no_larger",
    "test_replicas_are_the_processes_that_answer",
    "test_its_metrics_agree_with_what_the_client_counted",
    "test_replicas_come_and_go",
    "test_a_killed_replica_is_gone_and_every_request_ends",
    "test_stop_leaves_nothing",
    "test_a_full_queue_sheds_and_a_long_wait_ends",
    "test_a_server_that_dies_while_it_loads_is_told_at_once",
}
KEPT = {
    "test_every_model_answers_as_its_reference",
    "test_a_missing_dependency_is_named",
    "test_a_busy_port_is_named",
    "test_every_knob_has_a_place_or_a_reason",
}


def test_a_liar_is_caught_by_each_promise_that_it_breaks(tmp_path: Path) -> None:
    left = Path("/dev/shm") / f"tailrace-liar-{os.getpid()}"  # noqa: S108 - where a server would leave something
    (tmp_path / "liar.py").write_text(LIAR.format(left=str(left)))
    distribution = tmp_path / "liar-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: liar\nVersion: 1.0\n")
    (distribution / "entry_points.txt").write_text("[tailrace.adapters]\nliar = liar:ADAPTER\n")
    command = [sys.executable, "-m", "pytest", "tests/contract", "--adapter", "liar", "-rA", "-q", "--tb=no"]
    quick = [
        "-k",
        "not every_workload",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:rerunfailures",
        f"--basetemp={tmp_path / 'basetemp'}",
    ]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "TAILRACE_CONTRACT_PATIENCE_S": "3"}
    try:
        done = subprocess.run(
            [*command, *quick], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600, check=False
        )
    finally:
        left.unlink(missing_ok=True)
    told = [line.split() for line in done.stdout.splitlines()]
    outcome = {
        words[1].partition("::")[2].partition("[")[0]: words[0] for words in told if "::" in " ".join(words[1:2])
    }
    assert {name for name, word in outcome.items() if word == "FAILED"} >= CAUGHT, done.stdout
    assert {name for name, word in outcome.items() if word == "PASSED"} >= KEPT, done.stdout
