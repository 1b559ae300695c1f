"""How long a process of a deployment counts as silent."""

from __future__ import annotations

import pytest

pytest.importorskip("grpc")

from runners.engines.mii.deployment.heartbeats import (
    Heartbeats,
    Watch,
    gateway_slot,
    replica_slots,
)
from runners.engines.mii.deployment.plan import DeploymentPlan, ReplicaPlan


def test_silence_begins_after_the_first_heartbeat_and_ends_with_the_next() -> None:
    heartbeats = Heartbeats.create(3)
    watch = Watch(heartbeats, (1, 2))
    for _ in range(3):
        watch.poll(0.5)
    assert watch.silence() == 0, "a process that loads a model sends none yet"
    heartbeats.write(1, 1)
    heartbeats.write(2, 1, step_age=4.0)
    for expected in (0.0, 0.5, 1.0):
        watch.poll(0.5)
        assert watch.silence() == expected
    heartbeats.write(2, 2)
    watch.poll(0.5)
    assert (watch.silence([1]), watch.silence([2])) == (1.5, 0)
    heartbeats.write(1, 0)  # it was restarted
    watch.poll(0.5)
    assert watch.silence() == 0.5  # of the other


def test_the_longest_step_counts() -> None:
    heartbeats = Heartbeats.create(3)
    heartbeats.write(0, 1, step_age=9.0)
    heartbeats.write(2, 1, step_age=2.0)
    assert Watch(heartbeats, (1, 2)).step_age() == 2


def test_every_process_has_a_place_of_its_own() -> None:
    replicas = [
        ReplicaPlan(port=1, torch_dist_port=2, zmq_port=3, gpu_indices=gpus)
        for gpus in ([0, 1], [2], [3, 4, 5])
    ]
    plan = DeploymentPlan(name="d", port=4, model_config={}, replicas=replicas)
    assert replica_slots(plan) == [range(1, 3), range(3, 4), range(4, 7)]
    assert gateway_slot(plan) == 7
