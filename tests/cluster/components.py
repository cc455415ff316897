"""How each program of Kubernetes is started: its files, its ports and its arguments. Pure but for writing those files.

It may write below the control plane's folder only and starts nothing itself.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal, assert_never

import yaml

from tests.cluster.pki import Authority, KeyPair, service_account_key

STAGES: Final = Path(__file__).with_name("stages.yaml")
RAISED_RATES: Final = {"controller-manager": 100, "scheduler": 2000}
"""Requests per second that each controller and the scheduler may send when raised; their defaults are 20 and 50.

No more for controllers, though nothing else would be in the way: a pod with a claim template costs two requests, and
of the claims that its controller has made it remembers the last 100 only. On a machine whose watches lag behind by
more than that, it makes a second claim for a pod and tells the pod of the one that nobody has allocated; the pod waits
for ever (github.com/kubernetes/kubernetes/issues/140217)."""

ClientRates = Literal["raised", "default"]


class Component(StrEnum):
    """A program of the control plane; the value is the name of its binary."""

    ETCD = "etcd"
    APISERVER = "kube-apiserver"
    CONTROLLER_MANAGER = "kube-controller-manager"
    SCHEDULER = "kube-scheduler"
    KWOK = "kwok"


ALL: Final = frozenset(Component)
API_ONLY: Final = frozenset({Component.ETCD, Component.APISERVER})
"""Enough for tests of definitions and admission: no controllers, no scheduling, no nodes."""

PORTS: Final = len(Component) + 1
"""One port per component, and a second one for etcd, which also wants one for peers it never has."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the files and ports of one control plane are, and how it was asked to be."""

    directory: Path
    ports: Sequence[int]
    """As many free loopback ports as PORTS says."""
    components: frozenset[Component]
    client_rates: ClientRates
    hold_until_prepared: bool
    extra_args: Mapping[Component, Sequence[str]]

    def port(self, component: Component) -> int:
        """The port at which `component` serves its clients."""
        return self.ports[list(Component).index(component)]

    @property
    def peer_port(self) -> int:
        """etcd's second port."""
        return self.ports[len(Component)]

    @property
    def url(self) -> str:
        """The API server's address."""
        return f"https://127.0.0.1:{self.port(Component.APISERVER)}"

    def pki(self, name: str) -> Path:
        """The file of a key or certificate."""
        return self.directory / "pki" / name

    def kubeconfig(self, user: str) -> Path:
        """The kubeconfig of `user` (a file name)."""
        return self.directory / f"{user}.kubeconfig"

    def environment(self) -> dict[str, str]:
        """Environment of the programs: kwok and kubectl must neither read nor leave settings in the user's home."""
        return {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(self.directory),
            # The garbage collector of the API server takes an eighth of all its time with Go's default of 100. After
            # bursts of a thousand leases its heap passes 3 GiB; one that stands at its limit is collected all the time.
            "GOGC": "300",
            "GOMEMLIMIT": "4GiB",
        }


def write_files(layout: Layout, authority: Authority) -> None:
    """Write keys, certificates, kubeconfigs and configuration files that `argv` refers to."""
    layout.pki("").mkdir()
    layout.pki("ca.crt").write_bytes(authority.certificate)
    _write_pair(layout, "server", authority.server())
    _write_pair(layout, "service-account", service_account_key())
    write_kubeconfig(layout, authority, "admin", "kubernetes-admin", ["system:masters"])
    write_kubeconfig(layout, authority, "controller-manager", "system:kube-controller-manager", [])
    write_kubeconfig(layout, authority, "scheduler", "system:kube-scheduler", [])
    (layout.directory / "scheduler.yaml").write_text(yaml.safe_dump(_scheduler_configuration(layout)))
    (layout.directory / "stages.yaml").write_text(_stages(layout.hold_until_prepared))


def write_kubeconfig(layout: Layout, authority: Authority, name: str, user: str, groups: Sequence[str]) -> Path:
    """A kubeconfig with a client certificate of its own for `user` in `groups`, stored under `name`."""
    _write_pair(layout, name, authority.client(user, groups))
    # Files, not inline data: clients copy inline data into temporary files, which a killed client leaves behind.
    cluster = {"server": layout.url, "certificate-authority": str(layout.pki("ca.crt"))}
    credentials = {
        "client-certificate": str(layout.pki(f"{name}.crt")),
        "client-key": str(layout.pki(f"{name}.key")),
    }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "embedded",
        "clusters": [{"name": "embedded", "cluster": cluster}],
        "users": [{"name": name, "user": credentials}],
        "contexts": [{"name": "embedded", "context": {"cluster": "embedded", "user": name}}],
    }
    path = layout.kubeconfig(name)
    path.write_text(yaml.safe_dump(config))
    return path


def argv(component: Component, program: Path, layout: Layout) -> list[str]:
    """The command line that starts `component`."""
    match component:
        case Component.ETCD:
            flags = _etcd(layout)
        case Component.APISERVER:
            flags = _apiserver(layout)
        case Component.CONTROLLER_MANAGER:
            flags = _controller_manager(layout)
        case Component.SCHEDULER:
            flags = _scheduler(layout)
        case Component.KWOK:
            flags = _kwok(layout)
        case _:
            assert_never(component)
    return [str(program), *flags, *layout.extra_args.get(component, ())]


def health_url(component: Component, layout: Layout) -> str:
    """The address that answers 200 once `component` works."""
    port = layout.port(component)
    match component:
        case Component.ETCD:
            return f"http://127.0.0.1:{port}/health"
        case Component.CONTROLLER_MANAGER:
            return f"https://127.0.0.1:{port}/healthz"
        case Component.APISERVER | Component.SCHEDULER:
            return f"https://127.0.0.1:{port}/readyz"
        case Component.KWOK:
            return f"http://127.0.0.1:{port}/healthz"
        case _:
            assert_never(component)


def _etcd(layout: Layout) -> list[str]:
    clients = f"http://127.0.0.1:{layout.port(Component.ETCD)}"
    peers = f"http://127.0.0.1:{layout.peer_port}"
    return [
        f"--data-dir={layout.directory / 'etcd'}",
        f"--listen-client-urls={clients}",
        f"--advertise-client-urls={clients}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
        "--unsafe-no-fsync",  # the data never outlives the machine
        "--log-level=warn",
    ]


def _apiserver(layout: Layout) -> list[str]:
    flags = [
        f"--etcd-servers=http://127.0.0.1:{layout.port(Component.ETCD)}",
        *_serving(Component.APISERVER, layout),
        "--advertise-address=127.0.0.1",
        "--endpoint-reconciler-type=none",
        f"--client-ca-file={layout.pki('ca.crt')}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={layout.pki('service-account.crt')}",
        f"--service-account-signing-key-file={layout.pki('service-account.key')}",
        "--profiling=false",
    ]
    if Component.CONTROLLER_MANAGER not in layout.components:
        # Nobody makes service accounts then, and this plugin would refuse every pod for lack of one.
        flags.append("--disable-admission-plugins=ServiceAccount")
    return flags


def _controller_manager(layout: Layout) -> list[str]:
    flags = [
        f"--kubeconfig={layout.kubeconfig('controller-manager')}",
        *_serving(Component.CONTROLLER_MANAGER, layout),
        f"--service-account-private-key-file={layout.pki('service-account.key')}",
        f"--root-ca-file={layout.pki('ca.crt')}",
        "--use-service-account-credentials",
        "--leader-elect=false",
        "--profiling=false",
    ]
    if layout.client_rates == "raised":
        rate = RAISED_RATES["controller-manager"]
        flags += [f"--kube-api-qps={rate}", f"--kube-api-burst={rate}"]
    return flags


def _scheduler(layout: Layout) -> list[str]:
    return [
        f"--config={layout.directory / 'scheduler.yaml'}",
        *_serving(Component.SCHEDULER, layout),
    ]


def _scheduler_configuration(layout: Layout) -> dict[str, Any]:
    connection: dict[str, Any] = {"kubeconfig": str(layout.kubeconfig("scheduler"))}
    if layout.client_rates == "raised":
        connection |= {"qps": RAISED_RATES["scheduler"], "burst": RAISED_RATES["scheduler"]}
    return {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": False},
        "clientConnection": connection,
    }


def _kwok(layout: Layout) -> list[str]:
    return [
        f"--kubeconfig={layout.kubeconfig('admin')}",
        f"--config={layout.directory / 'stages.yaml'}",
        "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
        "--node-lease-duration-seconds=40",
        "--node-ip=127.0.0.1",
        "--v=WARN",
        "--cidr=10.128.0.0/16",
        f"--server-address=127.0.0.1:{layout.port(Component.KWOK)}",
    ]


def _serving(component: Component, layout: Layout) -> list[str]:
    return [
        "--bind-address=127.0.0.1",
        f"--secure-port={layout.port(component)}",
        f"--tls-cert-file={layout.pki('server.crt')}",
        f"--tls-private-key-file={layout.pki('server.key')}",
    ]


def _stages(hold_until_prepared: bool) -> str:
    """The stages; where asked, a pod with claims waits until the stand-in for kubelet has marked it as prepared."""
    if not hold_until_prepared:
        return STAGES.read_text()
    without_claims = "(.spec.resourceClaims // [] | length) == 0"
    prepared = '.metadata.annotations["gpu-tenancy.dev/prepared"] != null'
    stages = list(yaml.safe_load_all(STAGES.read_text()))
    running = next(stage for stage in stages if stage["metadata"]["name"] == "pod-running")
    running["spec"]["selector"]["matchExpressions"].append(
        {"jq": {"key": f"select({without_claims} or {prepared}) | .metadata.name", "operator": "Exists"}}
    )
    return str(yaml.safe_dump_all(stages))


def _write_pair(layout: Layout, name: str, pair: KeyPair) -> None:
    layout.pki(f"{name}.crt").write_bytes(pair.certificate)
    layout.pki(f"{name}.key").write_bytes(pair.key)
