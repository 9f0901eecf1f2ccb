"""What every update is compiled to for accelerators that this machine does not have: `make compiled`."""

import argparse
import functools
import os
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.tree import Tree

from benchmarks import hlo
from mtlgrad_jax.registry import METHODS, ROWS
from mtlgrad_jax.registry import make as make_row

# The published figures of the card, from which the compiler chooses tilings. Nothing is measured.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 85045149696
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
PLATFORMS = {"h100": "cuda", "v5e": "tpu"}
NAMES = [row.name for row in METHODS]
PARAMETERS = 1024


def prepare() -> None:
    """Set what the compilers read when they start: no device is looked for."""
    nvcc = Path(sysconfig.get_path("purelib")) / "nvidia" / "cuda_nvcc"
    os.environ["PATH"] = f"{nvcc / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={nvcc}"
    tpu = {"SKIP_MDS_QUERY": "1", "ACCELERATOR_TYPE": "v5litepod-4", "WORKER_HOSTNAMES": "localhost", "WORKER_ID": "0"}
    os.environ |= {f"TPU_{key}": value for key, value in tpu.items()}
    jax.config.update("jax_platforms", "cpu")


@functools.cache
def devices(target: str) -> Any:
    """The devices of a machine that is described, not there."""
    if target == "v5e":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=H100).devices


def compile_update(name: str, num_tasks: int, size: int, target: str) -> Any:
    """The compiled update of a method, for K gradients of one leaf."""
    tx = make_row(ROWS[name], num_tasks)
    sharding = SingleDeviceSharding(devices(target)[0])

    def on_device(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    params = {"leaf": jax.ShapeDtypeStruct((size,), "float32")}
    stack = {"leaf": jax.ShapeDtypeStruct((num_tasks, size), "float32")}
    args = on_device((stack, jax.eval_shape(tx.init, params), params, jax.ShapeDtypeStruct((num_tasks,), "float32")))

    def step(stack: Any, state: Any, params: Any, losses: Any) -> Any:
        return tx.update(stack, state, params, losses=losses)

    return jax.jit(step).trace(*args).lower(lowering_platforms=(PLATFORMS[target],)).compile()


def describe(part: hlo.Part) -> str:
    calls = [f"{count} {name}" for name, count in Counter(part.library).items()]
    return f"{part.launches} launches" + (f" (with {', '.join(calls)})" if calls else "")


def grow(tree: Tree, part: hlo.Part) -> Tree:
    """Add the loops and conditionals of a part to what is printed."""
    for loop in part.loops:
        trips = f"{loop.trips} iterations" if loop.trips else "the host waits for each iteration"
        condition = f" + condition {describe(loop.condition)}" if loop.condition.launches else ""
        grow(
            tree.add(f"[bold]loop[/] {loop.op_name}: {describe(loop.body)}{condition} an iteration; {trips}"), loop.body
        )
    for choice in part.conditionals:
        branch = tree.add(f"[bold]conditional[/] {choice.op_name}: the host waits")
        for inner in choice.branches:
            grow(branch.add(f"branch: {describe(inner)}"), inner)
    return tree


def main(argv: list[str] | None = None) -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=list(PLATFORMS), default="h100", help="(%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="(all)")
    parser.add_argument("--tasks", nargs="+", type=int, default=[8], metavar="K", help="(8)")
    args, console = parser.parse_args(argv), Console(width=200)
    prepare()
    for name in args.methods:
        for num_tasks in args.tasks:
            program = hlo.program(compile_update(name, num_tasks, PARAMETERS, args.target).as_text())
            everything = sum(part.launches for part in hlo.walk(program))
            tree = Tree(
                f"[bold]{name}[/], K = {num_tasks}: entry {describe(program)}; {everything} in the whole program"
            )
            console.print(grow(tree, program))


if __name__ == "__main__":
    main()
