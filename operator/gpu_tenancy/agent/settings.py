"""Settings of the agent: where things are, and how patient it is. Frozen; read once, passed down."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from pydantic import Field

from gpu_tenancy.api.names import DRIVER, SYSTEM_NAMESPACE
from gpu_tenancy.configuration import Configuration


class AdoptForeign(StrEnum):
    """What is done about MIG instances that the agent did not create."""

    REPORT = "Report"
    """They are named in GpuNode.status and left alone; nothing is planned where they lie."""
    DESTROY = "Destroy"
    """They are destroyed once no process uses them."""


class AgentSettings(Configuration):
    """Everything about an agent that is not its node's name. Times are in seconds."""

    kubeconfig: str | None = None
    """Path of a kubeconfig; absent: the pod's service account, else ~/.kube/config."""
    host: str = "0.0.0.0"  # noqa: S104  (the node's own address)
    """Address of /metrics, /healthz and /readyz."""
    port: int = Field(default=8081, ge=0, le=65535)
    """Their port; 0: any free one."""
    driver_root: Path = Path("/")
    """Folder under which the agent finds NVIDIA's driver: its libraries, `dev` and `proc`."""
    host_driver_root: Path = Path("/")
    """What the same folder is on the host: where the container runtime finds the driver's libraries and hooks."""
    driver_cdi: Path | None = None
    """File with the CDI container edits that every container with a GPU needs of the driver, as JSON; absent: asked of
    nvidia-ctk, once for each driver version."""
    nvidia_ctk: str = "nvidia-ctk"
    """Command of NVIDIA's container toolkit."""
    nvidia_smi: str = "nvidia-smi"
    """Command that resets a GPU."""
    runtime_socket: Path | None = Path("/run/containerd/containerd.sock")
    """Socket of the container runtime, which is asked what its default runtime is, and what pods are called; null where
    there is none to ask."""
    adopt_foreign: AdoptForeign = AdoptForeign.REPORT
    """What is done about MIG instances that the agent did not create: Report or Destroy."""
    kubelet_root: Path = Path("/var/lib/kubelet")
    """kubelet's folder: the agent's sockets go into its `plugins` and `plugins_registry`."""
    cdi_root: Path = Path("/var/run/cdi")
    """Folder in which the container runtime looks for CDI files."""
    state_dir: Path = Path("/var/lib/gpu-tenancy")
    """Folder of the agent's checkpoint; it must survive the agent, and may survive a reboot."""
    dev_root: Path = Path("/")
    """Folder under which the host has the `dev` of its driver: what the container runtime is told."""
    namespace: str = SYSTEM_NAMESPACE
    """Namespace of the heartbeat Lease."""
    heartbeat_seconds: float = Field(default=10.0, gt=0)
    """Period of the heartbeat."""
    heartbeat_lease_seconds: int = Field(default=40, ge=1)
    """How long a heartbeat is good for; after that the node is planned on no more."""
    observe_seconds: float = Field(default=30.0, gt=0)
    """Period in which GPUs and instances are looked at though nothing happened."""
    confirm_seconds: float = Field(default=1.0, ge=0)
    """After how long a GPU that looks faulty is looked at again before that is believed."""
    first_look_seconds: float = Field(default=10.0, gt=0)
    """How long the first look at the instances of all GPUs may take before those that answered are served."""
    node_seconds: float = Field(default=60.0, gt=0)
    """Period in which the Node is read for the declared mode of its GPUs."""
    coalesce_seconds: float = Field(default=0.005, ge=0)
    """How long a write to the API server waits for company."""
    linger_seconds: float = Field(default=1.0, ge=0)
    """How long a change of status that nobody waits for may wait for one that somebody does."""
    process_interval_seconds: float = Field(default=0.02, gt=0)
    """Time between the two looks for processes."""
    process_retry_seconds: float = Field(default=0.05, gt=0)
    """First pause after a process was seen; doubles up to twenty times as much."""
    prepare_patience_seconds: float = Field(default=20.0, ge=0)
    """How long a claim that kubelet asks for waits for a device that is being made; kubelet gives up after 45."""
    scrub_seconds: float = Field(default=30.0, gt=0)
    """How long one scrub may take before it is killed and tried again."""
    probation_seconds: float = Field(default=600.0, ge=0)
    """How long a place stays out of use after an error, or after a device could not be made there in time."""
    deadline_seconds: float = Field(default=1.0, gt=0)
    """Period in which deadlines of hand-overs are looked at while there is one."""
    retry_seconds: float = Field(default=0.5, gt=0)
    """First pause after the driver refused something; doubles."""
    retry_limit_seconds: float = Field(default=60.0, gt=0)
    """Longest pause after the driver refused something."""

    @property
    def checkpoint(self) -> Path:
        """The checkpoint file."""
        return self.state_dir / "checkpoint.json"

    @property
    def dra_socket(self) -> Path:
        """Socket on which kubelet asks for claims."""
        return self.kubelet_root / "plugins" / DRIVER / "dra.sock"

    @property
    def registration_socket(self) -> Path:
        """Socket by which kubelet finds the agent."""
        return self.kubelet_root / "plugins_registry" / f"{DRIVER}-reg.sock"
