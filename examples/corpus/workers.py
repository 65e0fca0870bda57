"""The processes of Ray that hold a model."""

import argparse
from typing import Any


def worker_settings(workers: int | None, num_tasks: int) -> dict[str, Any]:
    """Arguments of `Dataset.map` and its like, for actors of which each has a GPU of its own, or else a core.

    Starts Ray, unless it runs: the cluster that RAY_ADDRESS names, or one on this machine.

    Args:
        workers: how many; by default as many as there are GPUs, or else cores.
        num_tasks: how many there can be use of.

    Raises:
        ValueError: if there cannot be so many.
    """
    import ray
    from ray.data import ActorPoolStrategy

    if not ray.is_initialized():
        ray.init()
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    most = int(resources.get(kind, 0))
    if workers is not None and not 1 <= workers <= most:
        raise ValueError(f"Ray has {most} {kind}s, so --workers must be from 1 to {most}, not {workers}.")
    return {
        # The next task goes to the worker that is done with its last one.
        "compute": ActorPoolStrategy(size=min(workers or most, num_tasks), max_tasks_in_flight_per_actor=1),
        "num_cpus": 1,
        "num_gpus": int(kind == "GPU"),
    }


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="how many (default: one per GPU, or else per core)")
