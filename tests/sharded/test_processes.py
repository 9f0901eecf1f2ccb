"""Two processes on one machine, each with two devices, train one sharded model."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from steps import IN_PROCESSES, train

HERE = pathlib.Path(__file__).parent
SECONDS = 240


def free_address():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"


def run(count, folder):
    """Run the processes to their end; after an error or too long a wait, end them and show what they wrote."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }
    address = free_address()
    logs = [folder / f"{index}.log" for index in range(count)]
    processes = []
    try:
        for index, log in enumerate(logs):
            command = [sys.executable, str(HERE / "worker.py"), address, str(count), str(index), str(folder)]
            with log.open("w") as output:
                process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            processes.append(process)
        end = time.monotonic() + SECONDS
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    assert codes == [0] * count, "\n".join(
        f"ended with {code}:\n{log.read_text()}" for code, log in zip(codes, logs, strict=True)
    )
    return [list(np.load(folder / f"{index}.npz").values()) for index in range(count)]


def test_two_processes_train_as_one_device(tmp_path):
    """Random methods too: both processes see the same numbers, and they are those of a run in this process."""
    first, second = run(2, tmp_path)
    alone = jax.tree.leaves({name: train(name, route)[-1] for name, route in IN_PROCESSES.items()})
    for one, other, leaf in zip(first, second, alone, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, leaf, rtol=1e-4, atol=1e-5)
