"""Which of the machines of a training this is, as torchrun's environment says.

Kubeflow Trainer sets these variables in every pod of a TrainJob; elsewhere whoever starts the same command on every
machine sets them:

    PET_NNODES         how many machines
    PET_NODE_RANK      which of them this is, from 0
    PET_MASTER_ADDR    name or address of the first, which the others reach
    PET_MASTER_PORT    a free port of it
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from rfdetr_core.errors import ConfigError

COUNT, RANK, ADDRESS, PORT = "PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"


@dataclass(frozen=True)
class Nodes:
    """This machine among those that train together; by default, alone."""

    count: int = 1
    rank: int = 0
    address: str = ""
    port: int = 0

    @property
    def is_first(self) -> bool:
        """Whether the main rank is here: the machine that writes what a training leaves."""
        return self.rank == 0


def this_node(num_nodes: int) -> Nodes:
    """What the environment says of this machine.

    Args:
        num_nodes: `train.num_nodes`, which the environment must not contradict: two machines that each believe to be
            alone would train the same model twice and write it to the same place.

    Raises:
        ConfigError: another number of machines, or variables that are missing or no numbers.
    """
    said = os.environ.get(COUNT)
    if num_nodes == 1 and said in (None, "", "1"):
        return Nodes()
    if not said:
        raise ConfigError(
            f"train.num_nodes: {num_nodes} nodes are asked for, and this process is on its own",
            hint=f"on a cluster submit with the profile multi-node; elsewhere run the same command on every node, with "
            f"{COUNT}, {RANK}, {ADDRESS} and {PORT} set",
        )
    if said != str(num_nodes):
        raise ConfigError(
            f"train.num_nodes: {num_nodes}, but {COUNT} says {said} nodes", hint="make them equal on every node"
        )
    rank, port, address = os.environ.get(RANK, ""), os.environ.get(PORT, ""), os.environ.get(ADDRESS, "")
    if not rank.isdecimal() or int(rank) >= num_nodes:
        raise ConfigError(f"{RANK}: {rank!r} is not one of 0..{num_nodes - 1}", hint="number the nodes from 0")
    if not address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"{ADDRESS}={address} and {PORT}={port} name no port of the first node",
            hint="set them to its name and a free port of it, on every node alike",
        )
    return Nodes(num_nodes, int(rank), address, int(port))
