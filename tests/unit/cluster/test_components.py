"""The command lines and files of the control plane's programs."""

from pathlib import Path

import pytest
import yaml

from tests.cluster.components import ALL, API_ONLY, PORTS, ClientRates, Component, Layout, argv, write_files
from tests.cluster.pki import Authority

PROGRAM = Path("/bin/program")


def layout(
    directory: Path,
    *,
    components: frozenset[Component] = ALL,
    rates: ClientRates = "raised",
    hold: bool = False,
    extra: dict[Component, list[str]] | None = None,
) -> Layout:
    return Layout(
        directory=directory,
        ports=range(20_000, 20_000 + PORTS),
        components=components,
        client_rates=rates,
        hold_until_prepared=hold,
        extra_args=extra or {},
    )


def scheduler_connection(directory: Path) -> dict[str, object]:
    connection: dict[str, object] = yaml.safe_load((directory / "scheduler.yaml").read_text())["clientConnection"]
    return connection


@pytest.mark.parametrize(("rates", "raised"), [("raised", True), ("default", False)])
def test_client_rates_are_raised_unless_the_default_ones_are_asked_for(
    tmp_path: Path, rates: ClientRates, raised: bool
) -> None:
    chosen = layout(tmp_path, rates=rates)
    write_files(chosen, Authority.create())
    assert ("--kube-api-qps=100" in argv(Component.CONTROLLER_MANAGER, PROGRAM, chosen)) is raised
    assert ("qps" in scheduler_connection(tmp_path)) is raised


@pytest.mark.parametrize("component", Component)
def test_further_flags_come_last_so_that_they_win(tmp_path: Path, component: Component) -> None:
    command = argv(component, PROGRAM, layout(tmp_path, extra={component: ["--theirs=1"]}))
    assert (command[0], command[-1]) == (str(PROGRAM), "--theirs=1")


@pytest.mark.parametrize("component", Component)
def test_no_flag_names_an_address_off_this_machine(tmp_path: Path, component: Component) -> None:
    command = argv(component, PROGRAM, layout(tmp_path))
    addresses = [flag for flag in command if "-address=" in flag or "-urls=" in flag]
    assert addresses
    assert all("127.0.0.1" in flag for flag in addresses)


def test_pods_need_no_service_account_where_nobody_makes_them(tmp_path: Path) -> None:
    flag = "--disable-admission-plugins=ServiceAccount"
    assert flag in argv(Component.APISERVER, PROGRAM, layout(tmp_path, components=API_ONLY))
    assert flag not in argv(Component.APISERVER, PROGRAM, layout(tmp_path))


def test_holding_pods_adds_one_condition_to_their_start_and_changes_nothing_else(tmp_path: Path) -> None:
    texts = []
    for hold in (False, True):
        folder = tmp_path / str(hold)
        folder.mkdir()
        write_files(layout(folder, hold=hold), Authority.create())
        texts.append({one["metadata"]["name"]: one for one in yaml.safe_load_all((folder / "stages.yaml").read_text())})
    free, held = texts
    added = held["pod-running"]["spec"]["selector"]["matchExpressions"].pop()
    assert "gpu-tenancy.dev/prepared" in added["jq"]["key"]
    assert held == free
