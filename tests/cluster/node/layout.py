"""Where the files of one real node are, and how kubelet and containerd are told. Pure but for writing those files.

It may write below the node's folder only and starts nothing itself.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from tests.cluster.node.images import PAUSE

CONTAINERD_SOCKET: Final = "/run/containerd/containerd.sock"
"""As on every node: each machine has a /run of its own."""
RUNTIME: Final = "runc"


@dataclass(frozen=True, slots=True)
class NodeLayout:
    """One node's files, addresses and programs."""

    name: str
    directory: Path
    number: int
    """Tells the address ranges of nodes apart."""
    programs: Mapping[str, Path]
    """The programs of binaries.NODE by name."""
    kubeconfig: Path
    """How kubelet signs in."""
    authority: Path
    """Certificate of the authority whose clients kubelet trusts."""
    labels: Mapping[str, str] = field(default_factory=dict)
    default_runtime: tuple[str, Path] | None = None
    """Name and program of what starts containers unless a pod asks for `RUNTIME`; it is called just like runc."""
    sync_frequency: str = "5s"
    """How often kubelet looks at a pod though nothing happened; a pod whose claims could not be prepared is tried again
    after this time and up to half of it more. kubelet's own is a minute."""

    @property
    def address(self) -> str:
        """The node's address, on its own machine only."""
        return f"10.76.{self.number // 250}.{self.number % 250 + 1}"

    @property
    def pod_range(self) -> str:
        """Addresses of its pods."""
        return f"10.{80 + self.number // 250}.{self.number % 250}.0/24"

    @property
    def kubelet_roots(self) -> Path:
        """Folder of kubelet's root folder, which has the node's name."""
        return self.directory / "kubelet"

    @property
    def kubelet_root(self) -> Path:
        """kubelet's root folder, with ``plugins`` and ``plugins_registry``."""
        return self.kubelet_roots / self.name

    @property
    def cdi_root(self) -> Path:
        """Where containerd looks for CDI files."""
        return self.kubelet_root / "cdi"

    @property
    def pod_logs(self) -> Path:
        """Where what containers write goes."""
        return self.directory / "pods"

    @property
    def cni(self) -> Path:
        """Configuration of the pod network."""
        return self.directory / "cni"

    @property
    def containerd_socket(self) -> Path:
        """Where containerd answers, on its machine only."""
        return Path(CONTAINERD_SOCKET)

    def file(self, name: str) -> Path:
        """A configuration file."""
        return self.directory / name

    def environment(self) -> dict[str, str]:
        """Environment of the programs; containerd finds its shim on PATH."""
        own = str(self.programs["containerd-shim-runc-v2"].parent)
        return {"PATH": os.pathsep.join([own, os.environ.get("PATH", "")]), "HOME": str(self.directory)}


def write_files(layout: NodeLayout) -> None:
    """Write the configuration files that `kubelet` and `containerd` refer to."""
    for folder in (layout.kubelet_root, layout.cdi_root, layout.pod_logs, layout.cni, layout.file("containerd")):
        folder.mkdir(parents=True)
    for name in ("plugins", "plugins_registry"):
        (layout.kubelet_root / name).mkdir()
    layout.file("kubelet.yaml").write_text(yaml.safe_dump(_kubelet_configuration(layout)))
    layout.file("containerd.toml").write_text(_containerd_configuration(layout))
    (layout.cni / "10-ptp.conflist").write_text(json.dumps(_network(layout)))


def kubelet(layout: NodeLayout) -> list[str]:
    """The command line that starts kubelet."""
    labels = ",".join(f"{key}={value}" for key, value in sorted(layout.labels.items()))
    return [
        str(layout.programs["kubelet"]),
        f"--config={layout.file('kubelet.yaml')}",
        f"--kubeconfig={layout.kubeconfig}",
        f"--root-dir={layout.kubelet_root}",
        f"--cert-dir={layout.file('kubelet-pki')}",
        f"--hostname-override={layout.name}",
        f"--node-ip={layout.address}",
        f"--node-labels={labels}",
        "--v=2",
    ]


def containerd(layout: NodeLayout) -> list[str]:
    """The command line that starts containerd."""
    return [str(layout.programs["containerd"]), "--config", str(layout.file("containerd.toml"))]


def ctr(layout: NodeLayout, *words: str) -> list[str]:
    """A command line of containerd's client, in the namespace that kubelet's containers are in."""
    return [str(layout.programs["ctr"]), "--address", CONTAINERD_SOCKET, "--namespace", "k8s.io", *words]


def _kubelet_configuration(layout: NodeLayout) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(layout.authority)},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "podLogsDir": str(layout.pod_logs),
        "volumePluginDir": str(layout.file("volume-plugins")),
        "clusterDNS": ["10.0.0.10"],
        "clusterDomain": "cluster.local",
        "failSwapOn": False,
        "failCgroupV1": False,
        # All machines share the host's control groups; the machine has made this one for the node, and removes it.
        "cgroupRoot": f"/{layout.directory.name}",
        "cgroupDriver": "cgroupfs",
        "enforceNodeAllocatable": [],
        "localStorageCapacityIsolation": False,
        "makeIPTablesUtilChains": False,
        # A developer's disk may be full for reasons that are none of a test's.
        "evictionHard": dict.fromkeys(("memory.available", "nodefs.available", "imagefs.available"), "0%"),
        "imageGCHighThresholdPercent": 100,
        "syncFrequency": layout.sync_frequency,
        "nodeStatusUpdateFrequency": "5s",
        "nodeLeaseDurationSeconds": 40,
        "registerWithTaints": [],
    }


def _containerd_configuration(layout: NodeLayout) -> str:
    default, program = layout.default_runtime or (RUNTIME, layout.programs["runc-unconfined"])
    runtimes = {RUNTIME: layout.programs["runc-unconfined"], default: program}
    # JSON strings and lists are TOML ones.
    return f"""\
version = 3
root = {json.dumps(str(layout.file("containerd")))}
state = "/run/containerd"

[grpc]
address = {json.dumps(CONTAINERD_SOCKET)}

[plugins.'io.containerd.cri.v1.images']
snapshotter = "native"

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = {json.dumps(PAUSE)}

[plugins.'io.containerd.cri.v1.runtime']
cdi_spec_dirs = {json.dumps([str(layout.cdi_root)])}
disable_apparmor = true
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = {json.dumps([str(layout.programs["ptp"].parent)])}
conf_dir = {json.dumps(str(layout.cni))}

[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = {json.dumps(default)}
""" + "".join(_runtime(name, program) for name, program in runtimes.items())


def _runtime(name: str, program: Path) -> str:
    table = f"plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{json.dumps(name)}"
    return f"""
[{table}]
runtime_type = "io.containerd.runc.v2"

[{table}.options]
BinaryName = {json.dumps(str(program))}
SystemdCgroup = false
"""


def _network(layout: NodeLayout) -> dict[str, Any]:
    addresses = {"type": "host-local", "ranges": [[{"subnet": layout.pod_range}]], "dataDir": "/run/netns-addresses"}
    return {
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [{"type": "ptp", "ipam": addresses | {"routes": [{"dst": "0.0.0.0/0"}]}}],
    }
