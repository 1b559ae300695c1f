"""Heartbeats of a deployment's processes, in memory that they share with their supervisor.

Each process has a slot in it, where it counts up once a second and keeps the duration of its
current step. A port would not do: the kernel accepts connections for a process that hangs. Nor
would a call: a server whose threads are all busy answers late.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable

from runners.engines.mii.deployment.plan import DeploymentPlan

HEARTBEAT_S = 1.0
BALANCER = 0
"""The slot of the load balancer."""
_SLOT = struct.Struct("=Qd")


def replica_slots(plan: DeploymentPlan) -> list[range]:
    """The slots of each replica's ranks."""
    slots, first = [], BALANCER + 1
    for replica in plan.replicas:
        slots.append(range(first, first + len(replica.gpu_indices)))
        first = slots[-1].stop
    return slots


def gateway_slot(plan: DeploymentPlan) -> int:
    """The slot of the REST gateway, which is the last."""
    return replica_slots(plan)[-1].stop


class Heartbeats:
    """The shared memory, by the descriptor that child processes inherit."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0)

    @classmethod
    def create(cls, slots: int) -> Heartbeats:
        """New memory. Raises: OSError."""
        descriptor = os.memfd_create("triptych-heartbeats")
        os.posix_fallocate(descriptor, 0, slots * _SLOT.size)
        return cls(descriptor)

    def write(self, slot: int, count: int, step_age: float = 0.0) -> None:
        """Set a slot; a count of 0 means that its process has not sent any yet."""
        _SLOT.pack_into(self._memory, slot * _SLOT.size, count, step_age)

    def read(self, slot: int) -> tuple[int, float]:
        """The count of a slot, and the duration in seconds of its process's current step."""
        count, step_age = _SLOT.unpack_from(self._memory, slot * _SLOT.size)
        return count, step_age

    def start(self, slot: int, step_age: Callable[[], float]) -> None:
        """Send this process's heartbeats from a thread, until it ends."""

        def send() -> None:
            count = 0
            while True:
                count += 1
                self.write(slot, count, step_age())
                time.sleep(HEARTBEAT_S)

        threading.Thread(target=send, daemon=True).start()

    async def send_from_loop(self, slot: int) -> None:
        """Send the heartbeats of an event loop, which end if it is blocked, until cancelled."""
        for count in itertools.count(1):
            self.write(slot, count)
            await asyncio.sleep(HEARTBEAT_S)


class Watch:
    """For how long the processes of some slots have been silent, by the polls of an observer.

    Polls are counted and not seconds: an observer that stood still itself has missed nothing.
    """

    def __init__(self, heartbeats: Heartbeats, slots: Iterable[int]) -> None:
        self._heartbeats = heartbeats
        self._counts = dict.fromkeys(slots, 0)
        self._silences = dict.fromkeys(self._counts, 0.0)

    def poll(self, period_s: float) -> None:
        """Look at all slots; to be called every `period_s` seconds."""
        for slot, last in self._counts.items():
            self._counts[slot], _ = self._heartbeats.read(slot)
            is_silent = self._counts[slot] == last != 0
            self._silences[slot] = self._silences[slot] + period_s if is_silent else 0.0

    def silence(self, slots: Iterable[int] | None = None) -> float:
        """The longest silence in seconds; none before the first heartbeat of a process."""
        return max(self._silences[slot] for slot in slots or self._silences)

    def step_age(self) -> float:
        """The duration in seconds of the longest current step."""
        return max(self._heartbeats.read(slot)[1] for slot in self._counts)
