"""The fault ``model_reload``."""

from __future__ import annotations

from dataclasses import replace

from tailrace.harness.contract.fault import Circumstances, Fault, Hit


class ModelReload(Fault):
    """A model that is loaded afresh, by the node's own management interface."""

    kind = "model_reload"
    does = "a node unloads its model and loads it again"
    scope = "node"
    order = 130
    needs = ("load_model", "unload_model")
    errand = True

    @classmethod
    def refusal(cls, at: Circumstances) -> str | None:
        """Whose models come and go has no model of its own."""
        return "with `multiplexing` models come and go by its policy" if at.multiplexed else None

    def aim(self, hit: Hit) -> list[Hit]:
        """The model, not the node's process."""
        return [replace(hit, name=f"{hit.nodes.models[0]} on {hit.nodes.part_name(hit.index)}", ref=None)]

    def apply(self, hit: Hit) -> None:
        deployment, model = hit.nodes.member(hit.index), hit.nodes.models[0]
        deployment.unload_model(model)
        deployment.load_model(model)


FAULT = ModelReload
