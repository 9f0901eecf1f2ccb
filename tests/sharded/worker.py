"""One process of several: train on a mesh over all of them, and write what it sees. See test_processes.py."""

import sys

import jax

if __name__ == "__main__":
    address, count, index, folder = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(index), initialization_timeout=60)

    import numpy as np
    from jax.experimental import multihost_utils
    from steps import IN_PROCESSES, train

    assert jax.process_count() == int(count)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    runs = {name: train(name, route, mesh)[-1] for name, route in IN_PROCESSES.items()}
    leaves = jax.tree.leaves(multihost_utils.process_allgather(runs, tiled=True))
    np.savez(f"{folder}/{index}.npz", *leaves)
    jax.distributed.shutdown()
