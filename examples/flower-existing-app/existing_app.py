"""An ordinary Flower app: FedAvg over sites that hold digits. Lines marked (+) add unlearning; the rest was there."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from sklearn.datasets import load_digits

import fedunlearn as fu  # (+)
from fedunlearn.federation.jobs import ClientData  # (+)
from fedunlearn.flower.client import unlearning_mod  # (+)
from fedunlearn.flower.engine import FlowerEngine  # (+)


class Net(torch.nn.Sequential):
    """The app's own model."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Conv2d(1, 16, 3, padding=1),
            torch.nn.BatchNorm2d(16),
            torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 3, padding=1),
            torch.nn.BatchNorm2d(32),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(128, 10),
        )


def load_site(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images and labels of this site."""
    number, sites = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    digits = load_digits()
    images = torch.tensor(digits.images[number::sites] * 255 / 16).round().to(torch.uint8)[:, None]
    return images, torch.tensor(digits.target[number::sites], dtype=torch.int64)


def site_data(context: Context) -> ClientData:  # (+)
    """Return what this site measures: the same images, with the names of the classes and their normalisation."""
    images, labels = load_site(context)
    names = tuple(str(digit) for digit in range(10))
    held = fu.LabelledImages(images, labels, names, mean=(0.3,), std=(0.4,))
    return ClientData(f"site-{context.node_config['partition-id']}", held)


client = ClientApp(mods=[unlearning_mod(lambda context: Net(), site_data)])  # (+) was: ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train one epoch on this site's images."""
    images, labels = load_site(context)
    forgotten = message.content["config"].get("exclude", [])  # (+) the classes that are being forgotten
    kept = torch.tensor([int(label) not in forgotten for label in labels])  # (+)
    images, labels = images[kept], labels[kept]  # (+)
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=message.content["config"]["lr"], momentum=0.9)
    model.train()
    for rows in torch.randperm(len(labels)).split(16):
        optimizer.zero_grad()
        inputs = (images[rows].float() / 255 - 0.3) / 0.4
        torch.nn.functional.cross_entropy(model(inputs), labels[rows]).backward()
        optimizer.step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(labels)})}
    return Message(RecordDict(content), reply_to=message)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Train with FedAvg, then forget."""
    config, out = context.run_config, Path(str(context.run_config["out"]))
    if not out.is_absolute():
        raise ValueError(f"out must be an absolute folder on the server, got {str(out)!r}")
    out.mkdir(parents=True, exist_ok=True)
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=int(config["num-rounds"]),
        train_config=ConfigRecord({"lr": 0.05}),
    )
    model = Net()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    torch.save(model.state_dict(), out / "original.pt")

    engine = FlowerEngine(grid, clients=len(list(grid.get_node_ids())))  # (+)
    unlearned = fu.unlearn(  # (+)
        model,
        fu.Federation(engine, fu.Journal(out / "journal")),
        forget=int(config["forget"]),
        cut=fu.Cut(0.3),
        repair=fu.Repair(fu.Training(lr=0.02), rounds=1),
        rank=fu.Ranking(fu.contrast),
    )
    digits = load_digits()  # the server's own test data; here simply all of them
    images = torch.tensor(digits.images * 255 / 16).round().to(torch.uint8)[:, None]
    names = tuple(str(digit) for digit in range(10))
    test = fu.LabelledImages(images, torch.tensor(digits.target, dtype=torch.int64), names, (0.3,), (0.4,))  # (+)
    fu.save_checkpoint(out / "unlearned.safetensors", unlearned.model, images=test, architecture={"name": "Net"})  # (+)
    before = fu.evaluate(model, test, forget=unlearned.forget)["accuracy"]  # (+)
    after = fu.evaluate(  # (+)
        unlearned.model, test, forget=unlearned.forget, row_kept=unlearned.repaired
    )["accuracy"]
    for what, own in (("before", before), ("after", after)):  # (+)
        print(
            f"{what}: right on {own['forget_row_kept']:.1%} of the forgotten class, {own['retain']:.1%} of the others"
        )
