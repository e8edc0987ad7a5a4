"""One server for as long as a benchmark needs it, brought up through its adapter as trials bring theirs up."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tailrace.harness.contract.adapter import Adapter, Deployment, DeployRequest, ServerEnvironment, Tuning
from tailrace.harness.contract.exchange import check_answer, exchange
from tailrace.harness.contract.workload import PreparedWorkload
from tailrace.harness.servers.emulated_device import device_environment
from tailrace.harness.servers.guardian import Guardian

_ANSWER_TIMEOUT_S = 30.0


@contextmanager
def served(
    adapter: Adapter,
    environment: ServerEnvironment,
    workload: PreparedWorkload,
    *,
    tuning: Tuning | None = None,
    options: Mapping[str, object] | None = None,
) -> Iterator[Deployment]:
    """A server that has given a right answer; it and all its files are gone in the end, however that comes."""
    with Guardian() as guardian, tempfile.TemporaryDirectory(prefix="tailrace-") as folder:
        guardian.remove_later(glob.escape(folder))
        devices, scratch, workdir = (Path(folder) / name for name in ("devices", "scratch", "server"))
        for made in (devices, scratch, workdir):
            made.mkdir()
        request = DeployRequest(
            workload=workload,
            models=tuple(workload.references),
            tuning=tuning or Tuning(),
            options=adapter.Options.model_validate(options or {}),
            protocol="http",
            environment=environment,
            workdir=workdir,
            scratch=scratch,
            server_env=device_environment(devices, 1),
        )
        deployment = adapter.start(request, guardian)
        try:
            deployment.wait_for(
                lambda: deployment.claims_ready() and _answers_right(deployment, workload),
                "give a right answer",
                adapter.start_timeout_s,
            )
            yield deployment
        finally:
            deployment.stop()


def _answers_right(deployment: Deployment, workload: PreparedWorkload) -> bool:
    endpoint, model = deployment.endpoint, next(iter(workload.references))
    answer = exchange(endpoint, endpoint.codec.encode(model, workload.payloads[0]), _ANSWER_TIMEOUT_S)
    return answer.ok and check_answer(endpoint, workload, model, 0, answer.headers, answer.body) is None
