"""The applications that run on the server's Ray, and the control socket by which they are asked about and changed.

Imported by ``server.py`` in the environment's interpreter, where nothing of the harness is.
"""

from __future__ import annotations

import json
import re
import socketserver
from collections.abc import Callable
from typing import Any, TypeAlias

import ray
from ray import serve
from ray.serve.context import _get_global_client

DEPLOYMENT = "Model"
"""The deployment of an application that takes the requests."""
_REPLICA_ANSWER_S = 10.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
Options: TypeAlias = Callable[[str], dict[str, Any]]
"""The options of each deployment by its name."""
Build: TypeAlias = Callable[[dict[str, Any], Options], serve.Application]


def without_colour(text: str) -> str:
    """What Ray says, without what only a terminal understands."""
    return _COLOUR.sub("", text)


def _on_device(one: dict[str, Any]) -> list[dict[str, Any]]:
    """The deployments of an application whose replicas compute on its device."""
    if "stages" not in one["args"]:
        return list(one["deployments"])
    names = {stage["name"] for stage in one["args"]["stages"] if stage["on_device"]}
    return [deployment for deployment in one["deployments"] if deployment["name"] in names]


class Applications:
    """What runs, and what the control socket can ask of it."""

    def __init__(self, config: dict[str, Any], nodes: int, build: Build) -> None:
        """``config`` is ``serve.json``; ``build`` makes what Serve runs of an application's ``args``."""
        self._nodes = nodes
        self._build = build
        self._applications = config["applications"]
        self._logging = config["logging_config"]

    def run_all(self) -> None:
        """Deploy every application; returns when Serve says that all run. Raises ``RuntimeError`` when one cannot."""
        _run(
            [
                serve.RunTarget(self._target(one), name=one["name"], route_prefix=one["route_prefix"])
                for one in self._applications
            ]
        )

    def load(self, request: dict[str, Any]) -> None:
        one = request["application"]
        try:
            _run([serve.RunTarget(self._target(one), name=one["name"], route_prefix=one["route_prefix"])])
        except RuntimeError:
            serve.delete(one["name"], _blocking=False)  # or Serve would go on trying
            raise
        self._applications = [*(other for other in self._applications if other["name"] != one["name"]), one]

    def scale(self, request: dict[str, Any]) -> None:
        """Deploy all that runs with another number of replicas, and no autoscaler to change it."""
        deployments = [deployment for one in self._applications for deployment in one["deployments"]]
        if self._nodes > 1:
            self._limit_per_node(deployments, request["replicas"])
        for deployment in deployments:
            deployment.pop("autoscaling_config", None)
            deployment["num_replicas"] = request["replicas"] * self._nodes
        self.run_all()

    def _limit_per_node(self, deployments: list[dict[str, Any]], most: int) -> None:
        """Set how many replicas a node may hold, for which Serve replaces all replicas, one after the other."""
        raised = any(most > deployment["max_replicas_per_node"] for deployment in deployments)
        for deployment in deployments:
            deployment["max_replicas_per_node"] = most
        if raised:
            # Before there are more: those find no room beside replicas that fill a node by the old limit, and Serve
            # replaces none of these while others are missing.
            self.run_all()

    def unload(self, request: dict[str, Any]) -> None:
        self._applications = [one for one in self._applications if one["name"] != request["model"]]
        serve.delete(request["model"], _blocking=False)  # blocking waits for the connections to drain, 30 s and more

    def whole(self, request: dict[str, Any]) -> list[int] | None:
        """The pids of all replicas, if by what Ray knows no node is missing, and by what Serve knows no replica."""
        if joined() != self._nodes:
            return None
        details = _get_global_client().get_serve_details()["applications"]
        deployments = [
            details[one["name"]]["deployments"][deployment["name"]]
            for one in self._applications
            for deployment in one["deployments"]
        ]
        if any(deployment["status"] != "HEALTHY" for deployment in deployments):
            return None
        return [
            replica["pid"]
            for deployment in deployments
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        ]

    def report(self, request: dict[str, Any]) -> dict[str, Any]:
        """What Serve's controller and the replicas say of themselves."""
        details = _get_global_client().get_serve_details()
        applications = {}
        tuned = {one["name"]: [deployment["name"] for deployment in _on_device(one)] for one in self._applications}
        for name, one in details["applications"].items():
            deployment = one["deployments"][next(iter(tuned.get(name, [])), DEPLOYMENT)]
            applications[name] = {
                "deployment_config": deployment["deployment_config"],
                "running": sum(replica["state"] == "RUNNING" for replica in deployment["replicas"]),
                "batching": serve.get_app_handle(name).batching.remote().result(timeout_s=_REPLICA_ANSWER_S),
            }
        return {"http_options": details["http_options"], "applications": applications}

    def _target(self, one: dict[str, Any]) -> serve.Application:
        deployments = {deployment["name"]: deployment for deployment in one["deployments"]}
        return self._build(one["args"], lambda name: self._options(deployments[name]))

    def _options(self, deployment: dict[str, Any]) -> dict[str, Any]:
        options = {key: value for key, value in deployment.items() if key != "name"}
        # One version for good, as `serve deploy` has it: by serve.run() alone every deployment would be of another version,
        # and a change of num_replicas replace all replicas, one after the other. But a change of the limit per node, which
        # does so in any case, Serve takes no notice of if the version stays.
        options |= {"version": str(options.get("max_replicas_per_node", 1)), "_internal": True}
        return {**options, "logging_config": self._logging}


def _run(targets: list[serve.RunTarget]) -> None:
    """Deploy and wait; a failure is told with what the model said, which Serve's own error leaves out."""
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        names = {target.name for target in targets}
        said = [
            f"{name}: {deployment.message}"
            for name, status in serve.status().applications.items()
            for deployment in status.deployments.values()
            if name in names and deployment.message
        ]
        raise RuntimeError("\n".join([str(error).strip(), *said])) from error


def joined() -> int:
    """How many worker nodes live, by what the head knows."""
    return len([node for node in ray.nodes() if node["Alive"]]) - 1


def _answer(applications: Applications, request: dict[str, Any]) -> dict[str, Any]:
    actions = {
        "load": applications.load,
        "unload": applications.unload,
        "scale": applications.scale,
        "report": applications.report,
        "whole": applications.whole,
    }
    try:
        return {"answer": actions[request["do"]](request)}
    except Exception as error:
        return {"error": without_colour(str(error) or repr(error))}


def control_socket(path: str, applications: Applications) -> socketserver.ThreadingUnixStreamServer:
    """A server on a Unix socket: a line of JSON (``{"do": …}``) is answered with another."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            answer = _answer(applications, json.loads(self.rfile.readline()))
            self.wfile.write(json.dumps(answer, default=str).encode() + b"\n")

    control = socketserver.ThreadingUnixStreamServer(path, Handler)
    control.daemon_threads = True
    return control
