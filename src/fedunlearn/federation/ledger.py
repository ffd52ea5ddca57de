"""The cost ledger: what each job asked of the clients, counted, not estimated."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fedunlearn.channels.copying import copied
from fedunlearn.channels.taps import with_gradients
from fedunlearn.federation.jobs import Job, Reply

_PASSES = 3  # in training
# Model to its shapes when it was counted, and the operations of an image.
_counted: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], tuple[int, int]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Entry:
    """One job over its clients.

    Attributes:
        job: kind of its task.
        clients: ids of those whose reply was used.
        refused: id to reason of those whose reply was not.
        samples: images processed, repeats counted.
        flops: floating-point operations of convolutions and matrix products over these images.
        seconds: time on clients, added up.
        bytes_down: weights and plan sent to all clients asked.
        bytes_up: answers received.
    """

    job: str
    clients: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    samples: int = 0
    flops: int = 0
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Entry:
        """Return the entry that ``to_dict`` took apart."""
        return Entry(**{**value, "clients": tuple(value["clients"])})


@dataclass(frozen=True)
class Cost:
    """What a phase cost the clients, over all its jobs.

    Attributes:
        rounds: jobs that were training rounds.
        client_samples: images processed.
        client_flops: floating-point operations.
        client_seconds: time, added up over clients.
        bytes_up: from clients.
        bytes_down: to clients.
        clients: how many different clients took part.
    """

    rounds: int = 0
    client_samples: int = 0
    client_flops: int = 0
    client_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    clients: int = 0

    @staticmethod
    def of(entries: Iterable[Entry]) -> Cost:
        """Return the sum of ``entries``."""
        entries = list(entries)
        return Cost(
            rounds=sum(entry.job == "train" for entry in entries),
            client_samples=sum(entry.samples for entry in entries),
            client_flops=sum(entry.flops for entry in entries),
            client_seconds=sum(entry.seconds for entry in entries),
            bytes_up=sum(entry.bytes_up for entry in entries),
            bytes_down=sum(entry.bytes_down for entry in entries),
            clients=len({name for entry in entries for name in entry.clients}),
        )


class Meter:
    """Adds up what the replies to a job cost, those that are refused too.

    Args:
        job: what was asked.
        shape: ``(colours, height, width)`` of the images that clients see.
        asked: to how many clients it was sent.
    """

    def __init__(self, job: Job, shape: tuple[int, int, int], asked: int) -> None:
        self._job = job
        self._shape = shape
        self._asked = asked
        self._clients: list[str] = []
        self._refused: dict[str, str] = {}
        self._samples = 0
        self._seconds = 0.0
        self._bytes = 0

    def count(self, reply: Reply, *, refused: str | None) -> None:
        """Count ``reply``, with the reason if it is refused."""
        if refused is None:
            self._clients += reply.members or (reply.client,)
        else:
            self._refused[reply.client] = refused
        self._samples += reply.samples
        self._seconds += reply.seconds
        # Under secure aggregation each client sends two masked numbers for one, without the keys and their shares.
        self._bytes += size_in_bytes(reply.tensors) * (2 * len(reply.members) or 1)

    def entry(self) -> Entry:
        """Return the ledger entry of what was counted."""
        state = self._job.model.module.state_dict()
        forward, training = _flops(self._job.model.module, state, self._shape)
        message = size_in_bytes(state) + len(self._job.model.plan.to_json())
        return Entry(
            job=self._job.task.kind,
            clients=tuple(self._clients),
            refused=self._refused,
            samples=self._samples,
            flops=self._samples * self._job.task.operations(self._job.model, forward, training),
            seconds=self._seconds,
            bytes_down=self._asked * message,
            bytes_up=self._bytes,
        )


def size_in_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes that the values of ``tensors`` take on the wire, without names and framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def flops_per_image(model: nn.Module, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Count the operations of one image: forward pass, and forward plus backward pass.

    Counted by the formulas of ``torch.utils.flop_counter`` on two blank images; one multiply-add is two operations,
    and only convolutions, matrix products and attention count, so the figure does not depend on the machine. Of a
    network that drops layers at random in training, the most of a few passes counts. A model is counted once for as
    long as its tensors keep their shapes and the same are trained: rounds of one phase ask again and again.
    """
    return _flops(model, model.state_dict(), shape)


def _flops(model: nn.Module, state: Mapping[str, Tensor], shape: tuple[int, int, int]) -> tuple[int, int]:
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    layout = (shape, *frozen, *(tensor.shape for tensor in state.values()))
    known = _counted.get(model)
    if known is None or known[0] != layout:
        known = _counted[model] = (layout, _count_flops(model, shape))
    return known[1]


def _count_flops(model: nn.Module, shape: tuple[int, int, int]) -> tuple[int, int]:
    counted, images = copied(model).cpu(), torch.zeros((2, *shape))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():  # whoever asks has draws and a mode of their own
        torch.default_generator.manual_seed(0)  # not that of a GPU, which nothing here puts back
        # With gradients: torch fuses attention where none are asked for, and has no formula for what comes of it.
        with _Counter() as counter:
            with_gradients(copied(counted)).eval()(images)
        forward = counter.flops
        most = max(_count_step(counted.train(), images) for _ in range(_PASSES))
    return forward // 2, most // 2


def _count_step(model: nn.Module, images: Tensor) -> int:
    with _Counter() as counter:
        loss = F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.int64))
        if loss.requires_grad:  # not of a model that is frozen
            torch.autograd.backward(loss)
    return int(counter.flops)


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    shapes = gradient.shape, query.shape, key.shape, value.shape
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


# On a CPU torch has operators of its own for attention, and no formulas for them.
_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations that torch has a formula for, as its ``FlopCounterMode`` does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch wraps the method below in something that imports torch._dynamo: 800 modules, seconds of CPU.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it, or what it is composed of."""
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket) or _ATTENTION.get(func.overloadpacket)
        if formula is None:
            with self:
                composed = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if composed is NotImplemented else composed
        result = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.flops += _convolution_backward(*args)
        else:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def _convolution_backward(gradient: Tensor, images: Tensor, weight: Tensor, bias: Any, *layer: Any) -> int:
    """Return the operations of both gradients: each costs what the forward pass does, whatever the groups.

    The formula of torch counts that of the weight ``groups`` times.
    """
    *how, (of_images, of_weight, _) = layer
    forward: int = flop_registry[torch.ops.aten.convolution](images, weight, bias, *how, out_val=gradient)
    return forward * (int(of_images) + int(of_weight))
