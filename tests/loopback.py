"""A Flower grid inside this process: real messages and real client apps, no transport; and a federation on it."""

import copy
from uuid import uuid4

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from conftest import make_images, make_net
from fedunlearn.data.partition import hold_out, partition
from fedunlearn.federation.jobs import ClientData
from fedunlearn.flower.client import client_app

CLIENTS, VALIDATION = hold_out(partition(make_images(100), by="iid", clients=4), 0.2)


class Loopback(Grid):
    """Hands each message to the app of its node at once; ``nodes`` may change while it is in use."""

    def __init__(self, nodes):
        self.nodes = dict(nodes)
        self.contexts = {}
        self.waiting = {}
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        numbers = []
        for sent in messages:
            message = copy.deepcopy(sent)  # as a transport would: nodes share nothing
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = str(uuid4())
            numbers.append(message.metadata.message_id)
            app, number = self.nodes[node]
            context = self.contexts.setdefault(node, Context(1, node, {"partition-id": number}, RecordDict(), {}))
            try:
                self.waiting[numbers[-1]] = app(message, context)
            except Exception as error:  # as Flower's clients do
                reply = Message(Error(2, f"{type(error)}:<{str(error)!r}>"), reply_to=message)
                self.waiting[numbers[-1]] = reply
        return numbers

    def pull_messages(self, message_ids):
        found = [self.waiting.pop(number) for number in list(message_ids) if number in self.waiting]
        return [message for message in found if message is not None]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run): ...

    @property
    def run(self): ...

    def create_message(self, *args, **options): ...


def load_images(context):
    name = list(CLIENTS)[context.node_config["partition-id"]]
    return ClientData(name, CLIENTS[name], VALIDATION.get(name))


def build_model(context):
    return make_net(seed=5)  # other weights than the server's: they must not matter


APP = client_app(build_model, load_images)


def nodes(app=APP, count=4):
    return {100 + k: (app, k) for k in range(count)}


def largest_difference(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values())
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
