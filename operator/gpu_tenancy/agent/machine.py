"""What an agent has in its hands: the GPUs of its node, the means to scrub them, and the node's processes."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_tenancy.agent.gpus import Gpus
from gpu_tenancy.agent.host import Host
from gpu_tenancy.agent.scrub import Scrubber


@dataclass(frozen=True, slots=True)
class Machine:
    """The hardware of one node, real or simulated."""

    gpus: Gpus
    """Its GPUs."""
    scrubber: Scrubber
    """Overwrites the memory of its devices."""
    host: Host
    """Its processes."""
