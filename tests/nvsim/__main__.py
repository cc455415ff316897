"""`python -m tests.nvsim STATE …`: look at a simulated node and break it, while others use it.

STATE is the file that the node lies in, and that $NVSIM_STATE names to its processes. Changes that file and nothing
else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import click
import pynvml
from rich.console import Console
from rich.table import Table

from tests.cluster.binaries import BuildError
from tests.nvsim import cdi, view
from tests.nvsim.node import NO_INSTANCE, Fault, Node, SimulatorError

KINDS: Final = ("compute", "graphics", "mps")
_of_node = click.make_pass_decorator(Node)
_instance = click.IntRange(min=0)


def _pattern(text: str) -> int:
    """A number in Python's spelling, e.g. 0xdeadbeef."""
    return int(text, 0)


class _Sentences(click.Group):
    """A group whose commands' errors are sentences."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401  (click's)
        try:
            return super().invoke(ctx)
        except (SimulatorError, BuildError) as error:
            raise click.ClickException(str(error)) from None
        except pynvml.NVMLError as error:
            raise click.ClickException(f"NVML on {ctx.params['state']}: {error}.") from None


@click.group(cls=_Sentences, help=__doc__)
@click.argument("state", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.pass_context
def main(ctx: click.Context, state: Path) -> None:
    ctx.obj = Node(state)


# --- looking ----------------------------------------------------------------------------------------------------------


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 200  # A pipe has none of its own: nothing is cut off there.
    console.print(table)


@main.command()
@_of_node
def show(node: Node) -> None:
    """What NVML says of the GPUs, their MIG devices and processes."""
    _print(view.node_table(node))


@main.command()
@_of_node
def faults(node: Node) -> None:
    """The faults that calls suffer, first match first."""
    _print(view.fault_table(node))


@main.command()
@click.argument("gpu", type=int)
@click.option("--device", help="Only what the holder of this GPU or MIG device can read: its UUID.")
@_of_node
def residue(node: Node, gpu: int, device: str | None) -> None:
    """What stands in a GPU's memory, and who wrote it."""
    _print(view.residue_table(node.readable(device) if device else node.residue(gpu)))


@main.command(name="cdi")
@_of_node
def cdi_(node: Node) -> None:
    """Print what `nvidia-ctk cdi generate` would, of the simulated driver."""
    click.echo(json.dumps(cdi.specification(node), indent=1))


# --- breaking ---------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("gpu", type=int)
@click.argument("code", type=int)
@click.option("--gi", type=_instance, default=NO_INSTANCE, help="GPU instance that it is about; default: none.")
@click.option("--ci", type=_instance, default=NO_INSTANCE, help="Compute instance that it is about; default: none.")
@_of_node
def xid(node: Node, gpu: int, code: int, gi: int, ci: int) -> None:
    """The driver tells of an Xid."""
    node.xid(gpu, code, gi=gi, ci=ci)


@main.command()
@click.argument("gpu", type=int)
@_of_node
def lose(node: Node, gpu: int) -> None:
    """The GPU falls off the bus, until a reboot."""
    node.lose(gpu)


@main.command()
@click.argument("gpu", type=int)
@_of_node
def reset(node: Node, gpu: int) -> None:
    """Do what nvidia-smi --gpu-reset does."""
    node.reset(gpu)


@main.command()
@_of_node
def reboot(node: Node) -> None:
    """Boot the node: a new boot id, no process and no instance is left."""
    node.reboot(seed=int.from_bytes(os.urandom(4), "little"))
    click.echo(node.boot_id)


@main.command()
@click.argument("gpu", type=int)
@click.option("--off", is_flag=True, help="Nobody holds it any more.")
@_of_node
def busy(node: Node, gpu: int, off: bool) -> None:
    """Some client holds the GPU: a change of MIG mode stays pending, and a reset is refused."""
    node.set("mig_busy", int(not off), gpu)


@main.command()
@click.argument("symbol")
@click.option("--gpu", type=int, default=-1, help="Only calls about this GPU.")
@click.option("--gi", type=int, default=-1, help="Only calls about this GPU instance.")
@click.option("--result", type=int, default=0, help="What they return: nvmlReturn_t, or CUresult of a cu… symbol.")
@click.option("--after", type=int, default=0, help="Calls that are left alone first.")
@click.option("--times", type=int, default=0, help="Calls that are then spoilt; 0: all.")
@click.option("--delay-ms", type=int, default=0, help="How late they come.")
@_of_node
def fault(node: Node, /, symbol: str, **how: int) -> None:
    """Make calls of SYMBOL fail or come late; its number is printed.

    "*" is every call of NVML, "cu*" every call of CUDA, gpu-reset what nvidia-smi does by that name.
    """
    click.echo(node.fault(symbol, **how).number)


@main.command()
@click.argument("number", type=int)
@_of_node
def clear(node: Node, number: int) -> None:
    """Take a fault away, by its number."""
    Fault(node, number).remove()


@main.command()
@click.argument("gpu", type=int)
@click.option("--corrected", type=int, default=0, help="Corrected errors more.")
@click.option("--uncorrected", type=int, default=0, help="Uncorrected errors more.")
@_of_node
def ecc(node: Node, /, gpu: int, **more: int) -> None:
    """Count ECC errors, since the driver was loaded and since ever."""
    for kind, count in more.items():
        for counter in ("ecc_volatile", "ecc_aggregate"):
            field = f"{counter}.{kind}"
            node.set(field, node.get(field, gpu) + count, gpu)


@main.command()
@click.argument("gpu", type=int)
@click.option("--pending", type=int, help="1: a row waits for a reset to be remapped.")
@click.option("--failed", type=int, help="1: a row could not be remapped.")
@click.option("--corrected", type=int, help="Rows remapped for corrected errors.")
@click.option("--uncorrected", type=int, help="Rows remapped for uncorrected errors.")
@_of_node
def remap(node: Node, /, gpu: int, **found: int | None) -> None:
    """Set what is known of remapped rows."""
    for what, value in found.items():
        if value is not None:
            node.set(f"remap_{what}" if what in {"pending", "failed"} else f"remapped_{what}", value, gpu)


@main.group()
def process() -> None:
    """Processes that are said to use a GPU, beside those that do."""


@process.command()
@click.argument("gpu", type=int)
@click.argument("pid", type=int)
@click.option("--gi", type=_instance, default=NO_INSTANCE, help="GPU instance that it uses; default: the whole GPU.")
@click.option("--ci", type=_instance, default=NO_INSTANCE, help="Compute instance that it uses.")
@click.option("--memory-mib", type=int, default=0)
@click.option("--kind", type=click.Choice(KINDS), default=KINDS[0])
@_of_node
def add(node: Node, gpu: int, pid: int, gi: int, ci: int, memory_mib: int, kind: str) -> None:
    """A process begins to use a GPU."""
    node.add_process(gpu, pid, gi=gi, ci=ci, memory=memory_mib << 20, kind=KINDS.index(kind))


@process.command()
@click.argument("pid", type=int)
@_of_node
def end(node: Node, pid: int) -> None:
    """It uses no GPU any more."""
    node.end_process(pid)


@main.command(name="set")
@click.argument("field")
@click.argument("value", type=int)
@click.option("--gpu", type=int, help="Of this GPU; default: of the node.")
@_of_node
def set_(node: Node, field: str, value: int, gpu: int | None) -> None:
    """Set any field of the node or of a GPU; src/state.h says what they mean."""
    names = node.fields(of_gpus=gpu is not None)
    if field not in names:
        of = "a GPU" if gpu is not None else "the node; --gpu names a GPU"
        raise click.ClickException(f"{field} is no field of {of}. There are: {', '.join(sorted(names))}.")
    node.set(field, value, gpu)


@main.command()
@click.argument("gpu", type=int)
@click.argument("pattern", type=_pattern)
@click.option("--slice", "slice_", type=int, help="Only this memory slice.")
@_of_node
def plant(node: Node, gpu: int, pattern: int, slice_: int | None) -> None:
    """Fill memory with a pattern of 32 bits, as a former holder would have left it."""
    node.plant(gpu, pattern, slice_)


if __name__ == "__main__":
    main(prog_name="python -m tests.nvsim")
