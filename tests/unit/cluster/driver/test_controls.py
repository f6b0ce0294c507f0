"""The search for controls beside the loop: what has ended is not repeated, one place is enough, a stop is heard."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

import pytest
from ray.exceptions import RayActorError

from cluster.driver import controls
from cluster.driver.controls import ControlSearch
from cluster.driver.failures import RunFailed, Stopped
from pipelines.config.load import load_config
from pipelines.machine.control import Budget, Row
from pipelines.machine.state import Trial


def rows(mean: float) -> List[Row]:
    return [{"release": i, "tokens": 8 * i, "bpb": {"a": mean + 1 - i}} for i in range(2)]


class Reference:
    """An answer, once the actor has a place."""

    def __init__(self, actor: Actor, value: Any = None) -> None:
        self.actor, self.value = actor, value


class Actor:
    """Trains at once: the nearer to a step size of 0.2, the better."""

    def __init__(self, has_place: bool, dies: bool) -> None:
        self.has_place, self.dies = has_place, dies
        self.last: Tuple[str, List[Row]] = ("", [])
        self.trained: List[Trial] = []
        self.ready = SimpleNamespace(remote=lambda: Reference(self))
        self.progress = SimpleNamespace(remote=lambda: Reference(self, self.last))
        self.train = SimpleNamespace(remote=self._train)

    def _train(self, trial: Trial, budget: Budget, base: str) -> Reference:
        assert (budget, base) == (Budget(7.0, 64), "base")
        self.trained.append(trial)
        self.last = (trial.name, rows(abs(trial.learning_rate - 0.2)))
        return Reference(self, (self.last[1], 5.0))


def get(reference: Reference) -> Any:
    if reference.actor.dies and reference.value is not None:
        raise RayActorError
    return reference.value


class Search:
    """A search on actors of which some find no place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, places: int = 2, dies: bool = False, stop: int = 10**9) -> None:
        self.actors: List[Actor] = []
        self.killed: List[Actor] = []
        self.options: List[Dict[str, Any]] = []
        self.told: Dict[str, float] = {}
        self.events: List[Tuple[str, Dict[str, Any]]] = []
        self.looked, self.stop = 0, stop

        def start(kind: type, *arguments: Any, control: bool, **options: Any) -> Actor:
            self.options.append(options)
            self.actors.append(Actor(len(self.actors) < places, dies))
            return self.actors[-1]

        def wait(references: List[Reference], timeout: float) -> Tuple[List[Reference], List[Reference]]:
            done = sorted((one for one in references if one.actor.has_place), key=lambda one: one.value is not None)[:1]
            return done, [one for one in references if one not in done]

        monkeypatch.setattr(controls, "ray", SimpleNamespace(wait=wait, get=get, kill=self.killed.append))
        monkeypatch.setattr(controls, "start_actor", start)
        monkeypatch.setattr(controls, "results", lambda references, timeout: [one.value for one in references])

    def run(self, done: Dict[str, Any], *overrides: str) -> None:
        cfg = load_config("smoke", ["control.learning_rates=[0.1]", "control.most=4", "pool.ranks=2", *overrides])
        tell = lambda name, rows, flops: self.told.update({name: flops})  # noqa: E731
        emit = lambda kind, **fields: self.events.append((kind, fields))  # noqa: E731
        ControlSearch(cfg, {}, Budget(7.0, 64), "base", done, emit, tell, self.check_stop).run()

    def check_stop(self) -> None:
        self.looked += 1
        if self.looked > self.stop:
            raise Stopped


EVERY = {f"{name}@{rate}" for name in ("replay", "naive") for rate in (0.05, 0.1, 0.2, 0.4)}


@pytest.mark.parametrize("places", [1, 2])
def test_all_is_tried_however_few_places_there_are(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(monkeypatch, places)
    search.run({})
    assert set(search.told) == EVERY and search.killed == search.actors
    assert sum(bool(actor.trained) for actor in search.actors) == places
    shown = [fields for kind, fields in search.events if kind == "control"]
    assert len(shown) == 2 * len(EVERY), "every row once"
    ends = [fields for kind, fields in search.events if kind == "control_finished"]
    assert {f"{one['strategy']}@{one['learning_rate']}" for one in ends} == EVERY


def test_what_has_ended_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(monkeypatch)
    search.run({"replay@0.1": {"rows": rows(0.1), "flops": 5.0}, "naive@0.1": {"rows": rows(0.1), "flops": 5.0}})
    assert set(search.told) == EVERY - {"replay@0.1", "naive@0.1"}
    again = Search(monkeypatch)
    again.run({name: {"rows": rows(abs(Trial.of(name).learning_rate - 0.2)), "flops": 5.0} for name in EVERY})
    assert not again.actors, "nothing is started for nothing"


def test_a_stop_is_heard_and_leaves_nobody_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(monkeypatch, stop=3)
    with pytest.raises(Stopped):
        search.run({})
    assert search.killed == search.actors and len(search.told) < len(EVERY)


def test_a_dead_control_ends_the_run_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(monkeypatch, dies=True)
    with pytest.raises(RunFailed, match=r"a control died: .*the same command trains it again"):
        search.run({})
    assert search.killed == search.actors


def test_controls_ask_for_the_places_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(monkeypatch)
    search.run({}, "ray.pool_resource=slow", "ray.rank_cpus=0.25", "compute.device=cuda", "ray.gpus=0.5")
    assert search.options == [{"num_cpus": 0.25, "num_gpus": 0.5, "resources": {"slow": 1.0}}] * 2
