"""One authenticated connection pool to one API server: the only module that imports the Kubernetes client.

From that client come kubeconfig and in-cluster loading, token refresh, exec plugins, TLS and proxies. Its models
are not used (decoding with them is a hundred times slower than the rest of a request); bodies are plain JSON and
answers are bytes. This module knows nothing of Kubernetes kinds and does not retry.
"""

from __future__ import annotations

import os
import tempfile
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.request import getproxies_environment

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config
from kubernetes.aio.config.kube_config import KubeConfigLoader, KubeConfigMerger

from gpu_tenancy.kube.errors import KubeError, Rejected, Transient

_SERVICE_ACCOUNT_TOKEN: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_HOME_KUBECONFIG: Final = Path("~/.kube/config")
_INLINE_FILES: Final = {
    "clusters": ("cluster", ("certificate-authority",)),
    "users": ("user", ("client-certificate", "client-key")),
}
"""Kubeconfig entries that may hold a file's content (base64) instead of its path."""


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request: `path` with its query string, `body` anything that JSON can say, or bytes of another type."""

    method: str
    path: str
    content_type: str = "application/json"
    body: object = None


@dataclass(slots=True)
class Transport:
    """A connection pool with credentials. Once retired it closes itself as soon as its last user has left."""

    api: Any
    """kubernetes.aio.client.ApiClient; Any because that package's types are not followed."""
    users: int = 0
    retired: bool = field(default=False)

    @asynccontextmanager
    async def send(self, call: Call, timeouts: aiohttp.ClientTimeout) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send `call` and give the answer as soon as its headers are there, whatever its status.

        Raises Transient for everything that prevents an answer, also while the answer's body is read inside
        the context.
        """
        self.users += 1
        try:
            with network_errors(f"{call.method} {call.path.partition('?')[0]}"):
                response = await self._start(call, timeouts)
                try:
                    yield response
                finally:
                    response.release()
        finally:
            self.users -= 1
            await self._close_if_unused()

    async def _start(self, call: Call, timeouts: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        # Compression costs both sides more than it saves inside a cluster's network.
        headers = {
            **self.api.default_headers,
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Content-Type": call.content_type,
        }
        await self.api.update_params_for_auth(headers, [], ["BearerToken"], call.path, call.method, call.body)
        url = self.api.configuration.host + call.path
        answer = await self.api.call_api(
            call.method, url, header_params=headers, body=call.body, _request_timeout=timeouts
        )
        response: aiohttp.ClientResponse = answer.response
        return response

    async def retire(self) -> None:
        """Close the pool now, or when the last request or watch that uses it has ended."""
        self.retired = True
        await self._close_if_unused()

    async def close(self) -> None:
        """Close the pool now; requests in flight fail as Transient."""
        self.retired = True
        await self.api.close()

    async def _close_if_unused(self) -> None:
        if self.retired and self.users == 0:
            await self.api.close()


@contextmanager
def network_errors(what: str) -> Iterator[None]:
    """Translate whatever a connection can raise into Transient; `what` names the request in the sentence."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise _transient("Unreachable", f"{what}: cannot connect to the API server: {error}", sent=False) from error
    except TimeoutError as error:
        raise _transient("Timeout", f"{what}: the API server did not answer in time.", sent=True) from error
    except (aiohttp.ClientError, OSError) as error:
        detail = str(error) or type(error).__name__
        raise _transient("ConnectionLost", f"{what}: the connection broke: {detail}", sent=True) from error
    except ConfigException as error:
        raise _transient("Credentials", f"{what}: no usable credentials: {error}", sent=False) from error


def _transient(reason: str, message: str, *, sent: bool) -> Transient:
    error = Transient(0, reason, message)
    error.not_executed = not sent
    return error


async def load(kubeconfig: str | None, user_agent: str) -> Transport:
    """Make a transport from a kubeconfig or from the pod's service account.

    `kubeconfig` is a path; without it $KUBECONFIG, the service account and ~/.kube/config are tried in this order.
    Raises Rejected, naming the source, where there is no usable configuration.
    """
    configuration = Configuration()
    # The caller bounds what is in flight, and watches must never wait for a free slot of the pool.
    configuration.connection_pool_maxsize = 0
    # Chain and host name are still verified; only RFC 5280 pedantry (an authority key id in the CA, ...) is not,
    # which the clusters' own clients do not ask for and many clusters' CAs do not have.
    configuration.disable_strict_ssl_verification = True
    # Asking the environment for proxies also looks for a .netrc in a thread, with every request.
    configuration.client_session_kwargs = {"trust_env": bool(getproxies_environment())}
    source = kubeconfig or os.environ.get("KUBECONFIG")
    with _configuration_errors(source or "the default configuration"), tempfile.TemporaryDirectory() as folder:
        if source is None and _in_cluster():
            load_incluster_config(client_configuration=configuration)
        else:
            loader = _read_kubeconfig(source or str(_HOME_KUBECONFIG), Path(folder))
            await loader.load_and_set(configuration)
        api = ApiClient(configuration)  # reads the certificates: the folder is not needed after this
    api.user_agent = user_agent
    return Transport(api)


def _in_cluster() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ and _SERVICE_ACCOUNT_TOKEN.is_file()


def _read_kubeconfig(paths: str, folder: Path) -> Any:  # noqa: ANN401  (a KubeConfigLoader, which has no types)
    """Read one or several (colon-separated) kubeconfig files; `folder` takes the certificates they contain."""
    if not any(Path(path).expanduser().is_file() for path in paths.split(os.pathsep) if path):
        raise ConfigException(f"there is no kubeconfig at {paths}; set KUBECONFIG or give a path")
    merged = KubeConfigMerger(paths).config
    for section, (entry, keys) in _INLINE_FILES.items():
        for index, node in enumerate(merged.value.get(section) or []):
            _write_inline_files(node.value.get(entry) or {}, keys, folder / f"{section}-{index}")
    return KubeConfigLoader(config_dict=merged, config_base_path=None)


def _write_inline_files(entry: dict[str, Any], keys: tuple[str, ...], stem: Path) -> None:
    """Put inline certificates and keys where OpenSSL can read them.

    The Kubernetes client would do so too, but leaves private keys in the system's temporary folder until the
    process ends in an orderly way.
    """
    for key in keys:
        if data := entry.pop(f"{key}-data", None):
            path = stem.with_name(f"{stem.name}-{key}.pem")
            path.write_bytes(b64decode(data))
            entry[key] = str(path)


@contextmanager
def _configuration_errors(source: str) -> Iterator[None]:
    try:
        yield
    except KubeError:
        raise
    except Exception as error:  # a loader of free-form YAML, plugins and certificates can fail in any way
        message = f"The Kubernetes configuration from {source} cannot be used: {error}"
        raise Rejected(0, "Configuration", message) from error


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header; None where there is none or it is a date, which API servers do not send."""
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None
