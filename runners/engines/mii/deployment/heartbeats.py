"""Heartbeats of a deployment's processes, in memory that they share with their supervisor.

Each process has a place in it, where it counts up once a second and keeps the duration of its
current step. A port would not do: the kernel accepts connections for a process that hangs. Nor
would a call: a server whose threads are all busy answers late.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable

from runners.engines.mii.deployment.plan import DeploymentPlan

HEARTBEAT_S = 1.0
BALANCER = 0
"""The place of the load balancer."""
_PLACE = struct.Struct("=Qd")


def replica_places(plan: DeploymentPlan) -> list[range]:
    """The places of each replica's ranks."""
    places, first = [], BALANCER + 1
    for replica in plan.replicas:
        places.append(range(first, first + len(replica.gpu_indices)))
        first = places[-1].stop
    return places


def gateway_place(plan: DeploymentPlan) -> int:
    """The place of the REST gateway, which is the last."""
    return replica_places(plan)[-1].stop


class Heartbeats:
    """The shared memory, by the descriptor that child processes inherit."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0)

    @classmethod
    def create(cls, places: int) -> Heartbeats:
        """New memory. Raises: OSError."""
        descriptor = os.memfd_create("triptych-heartbeats")
        os.posix_fallocate(descriptor, 0, places * _PLACE.size)
        return cls(descriptor)

    def write(self, place: int, count: int, step_age: float = 0.0) -> None:
        """Set a place; a count of 0 means that its process has not sent any yet."""
        _PLACE.pack_into(self._memory, place * _PLACE.size, count, step_age)

    def read(self, place: int) -> tuple[int, float]:
        """The count of a place, and the duration in seconds of its process's current step."""
        count, step_age = _PLACE.unpack_from(self._memory, place * _PLACE.size)
        return count, step_age

    def start(self, place: int, step_age: Callable[[], float] = lambda: 0.0) -> None:
        """Send this process's heartbeats, until it ends."""

        def send() -> None:
            count = 0
            while True:
                count += 1
                self.write(place, count, step_age())
                time.sleep(HEARTBEAT_S)

        threading.Thread(target=send, daemon=True).start()


class Watch:
    """For how long the processes of some places have been silent, by the polls of an observer.

    Polls are counted and not seconds: an observer that stood still itself has missed nothing.
    """

    def __init__(self, heartbeats: Heartbeats, places: Iterable[int]) -> None:
        self._heartbeats = heartbeats
        self._counts = dict.fromkeys(places, 0)
        self._silences = dict.fromkeys(self._counts, 0.0)

    def poll(self, period_s: float) -> None:
        """Look at all places; to be called every `period_s` seconds."""
        for place, last in self._counts.items():
            self._counts[place], _ = self._heartbeats.read(place)
            is_silent = self._counts[place] == last != 0
            self._silences[place] = self._silences[place] + period_s if is_silent else 0.0

    def silence(self, places: Iterable[int] | None = None) -> float:
        """The longest silence in seconds; none before the first heartbeat of a process."""
        return max(self._silences[place] for place in places or self._silences)

    def step_age(self) -> float:
        """The duration in seconds of the longest current step."""
        return max(self._heartbeats.read(place)[1] for place in self._counts)
