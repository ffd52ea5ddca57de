"""What all Flower code shares: its types, messages out and first answers back, tensors as arrays."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise ImportError("the Flower engine needs Flower: pip install 'fedunlearn[flower]'") from error

__all__ = [
    "ARRAYS",
    "CONFIG",
    "JOB",
    "OWN",
    "POLL",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Grid",
    "Message",
    "MetricRecord",
    "RecordDict",
    "ServerApp",
    "exchange",
    "to_arrays",
    "to_tensors",
]

# How a job travels: the one message type that each app answers and that SecAgg+ masks, and the records in it.
JOB = "train"
ARRAYS, CONFIG, OWN = "arrays", "config", "fedunlearn"
POLL = 0.2  # seconds; the grid's own send_and_receive looks every 3
_LONGEST_POLL = 3.0


def exchange(grid: Grid, messages: Sequence[Message], deadline: float) -> dict[int, Message]:
    """Send ``messages``, one per node, and return the first answer of each node that came within ``deadline`` s."""
    nodes = [message.metadata.dst_node_id for message in messages]
    sent = {number: node for number, node in zip(grid.push_messages(messages), nodes) if number}  # "": not sent
    answers: dict[int, Message] = {}
    began = time.monotonic()
    while True:
        waiting = {number for number, node in sent.items() if node not in answers}
        for message in grid.pull_messages(waiting) if waiting else ():
            # By what it answers: errors of the SuperLink come in its own name.
            node = sent.get(message.metadata.reply_to_message_id)
            if node is not None:
                answers.setdefault(node, message)
        left = deadline - (time.monotonic() - began)
        if len(answers) == len(sent) or left <= 0:
            return answers
        # Each look is a write in the SuperLink's database, which clients who answer at the same time wait for.
        time.sleep(min(max(POLL, (deadline - left) / 20), _LONGEST_POLL, left))


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as Flower's arrays."""
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()})


def to_tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return Flower's arrays, which it reads without pickle, as tensors."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
