"""fedunlearn makes a federated image classifier forget classes, fast, and shows that it did."""

from fedunlearn.audits.audit import Record, audit
from fedunlearn.audits.base import Figure, Subject
from fedunlearn.audits.findings import Findings
from fedunlearn.audits.images import AuditImages, audit_images
from fedunlearn.channels.groups import Channels, find_channels
from fedunlearn.channels.plan import Classifier, Cut, PruningPlan, plan_pruning, prune
from fedunlearn.channels.scores import ChannelScores, Ranking, contrast, margin, random_scores, tf_idf
from fedunlearn.channels.stats import ChannelStats, capped, mean_of_clients, measure_channels, pooled
from fedunlearn.checkpoint import load_weights, read_weights, save_checkpoint
from fedunlearn.console import RunProgress
from fedunlearn.data.datasets import from_dataset
from fedunlearn.data.images import LabelledImages
from fedunlearn.data.npz import read_npz
from fedunlearn.data.partition import hold_out, partition
from fedunlearn.data.readers import read_cifar10, read_cifar100, read_digits, read_folder, read_mnist
from fedunlearn.data.splits import Splits
from fedunlearn.errors import (
    DataError,
    EvidenceError,
    FederationError,
    FedUnlearnError,
    ModelError,
    PlanError,
    RecipeError,
    RunError,
)
from fedunlearn.export import export_onnx
from fedunlearn.federation.averaging import Server
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import Engine, Job, Reply
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.ledger import Cost
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.measuring import reestimate
from fedunlearn.federation.rounds import Repair, Watch, train_rounds
from fedunlearn.federation.tasks import Evaluate, Measure, Reestimate, Train
from fedunlearn.models import build_model
from fedunlearn.run.result import evaluate
from fedunlearn.smallest import Smallest, unlearn_smallest
from fedunlearn.training.compute import Compute
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.sgd import Training, one_cycle
from fedunlearn.training.speed import probe
from fedunlearn.unlearn import Unlearned, unlearn
from fedunlearn.version import __version__

__all__ = [
    "AuditImages",
    "ChannelScores",
    "ChannelStats",
    "Channels",
    "Classifier",
    "Compute",
    "Cost",
    "Cut",
    "DataError",
    "Engine",
    "Erasing",
    "Evaluate",
    "EvidenceError",
    "FedUnlearnError",
    "Federation",
    "FederationError",
    "Figure",
    "Findings",
    "Job",
    "Journal",
    "LabelledImages",
    "LocalEngine",
    "Measure",
    "ModelError",
    "PlanError",
    "PruningPlan",
    "Ranking",
    "RecipeError",
    "Record",
    "Reestimate",
    "Repair",
    "Reply",
    "RunError",
    "RunProgress",
    "Server",
    "Smallest",
    "Splits",
    "Subject",
    "Train",
    "Training",
    "Unlearned",
    "Watch",
    "__version__",
    "audit",
    "audit_images",
    "build_model",
    "capped",
    "contrast",
    "evaluate",
    "export_onnx",
    "find_channels",
    "from_dataset",
    "hold_out",
    "load_weights",
    "margin",
    "mean_of_clients",
    "measure_channels",
    "one_cycle",
    "partition",
    "plan_pruning",
    "pooled",
    "probe",
    "prune",
    "random_scores",
    "read_cifar10",
    "read_cifar100",
    "read_digits",
    "read_folder",
    "read_mnist",
    "read_npz",
    "read_weights",
    "reestimate",
    "save_checkpoint",
    "tf_idf",
    "train_rounds",
    "unlearn",
    "unlearn_smallest",
]
