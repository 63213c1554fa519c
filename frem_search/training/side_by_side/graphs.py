"""A member's step and validation as CUDA graphs: all kernels of one are started by a single call."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frem_search.segmentation.batch import Batch
from frem_search.segmentation.inference import predict
from frem_search.segmentation.metrics import METRICS, Score
from frem_search.segmentation.output import Features
from frem_search.training.epoch import end_epoch, loss_weights, step
from frem_search.training.member import EpochReport, Member

if TYPE_CHECKING:
    from frem_search.training.cohort import Cohort

WARM_UPS = 2  # steps before a capture: libraries choose kernels and allocate workspaces in the first ones


def train_epoch_graphed(cohort: "Cohort", graphs: Sequence["Graphed"]) -> list[EpochReport]:
    """Train members for one epoch, their steps in turn on streams of their own, and validate them."""
    started = time.perf_counter()
    for graph in graphs:
        graph.begin(cohort.begin_epoch(graph.member))
    for i in range(max((graph.n_steps for graph in graphs), default=0)):
        for graph in graphs:
            if i < graph.n_steps:
                graph.step()
    results = [graph.end() for graph in graphs]
    return [
        _report(cohort, graph, loss, features, started=started)
        for graph, (loss, features) in zip(graphs, results, strict=True)
    ]


def _report(
    cohort: "Cohort", graph: "Graphed", loss: Tensor, features: Features | None, *, started: float
) -> EpochReport:
    """Wait for a member's stream alone and end its epoch; what its metric raises on the CPU ends that member."""
    try:
        return end_epoch(graph.member, train_loss=loss.item(), features=features, score=graph.score(), started=started)
    except Exception as error:  # noqa: BLE001 whatever the code of a metric raises
        return cohort.ended(graph.member, error)


class Graphed:
    """A member whose step and validation were captured; its network, optimizer and buffers are changed in place.

    Of a metric that runs on the CPU, only the prediction is captured: a graph cannot wait for the device.

    Args:
        cohort: Whose loss, metric and precision are captured.
        member: On a CUDA device, its optimizer capturable.
    """

    def __init__(self, cohort: "Cohort", member: Member) -> None:
        self.member, self._cohort = member, cohort
        device = member.data.device
        self._epoch = cohort.begin_epoch(member)  # what the graph reads; the next epochs are copied into it
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._coefficients = loss_weights(member)
        self._total = torch.zeros((), device=device)
        self._sums: list[Tensor] = []
        self._metric = METRICS[cohort.metric]
        self._score: Score
        self._pred: Tensor
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        before = _state(member)
        try:
            self._replay_validation = capture(self._validate, self._stream)
            member.network.train()
            self._replay_step = capture(self._step, self._stream)
        finally:
            torch.cuda.current_stream(device).wait_stream(self._stream)
            _restore(member, before)

    @property
    def n_steps(self) -> int:
        """How many steps an epoch has."""
        return self._epoch.n_steps

    def begin(self, epoch: Batch) -> None:
        """Take the batches of an epoch, and let the stream wait for them."""
        for held, new in zip(self._epoch.tensors(), epoch.tensors(), strict=True):
            held.copy_(new)
        for each in (self._position, self._total, *self._sums):
            each.zero_()
        self._stream.wait_stream(torch.cuda.current_stream(self.member.data.device))

    def step(self) -> None:
        """Train on the next batch, not waiting for the device."""
        self._replay_step(self._stream)

    def end(self) -> tuple[Tensor, Features | None]:
        """Validate; return mean loss and mean feature magnitudes, for the caller's stream to read."""
        self._replay_validation(self._stream)
        torch.cuda.current_stream(self.member.data.device).wait_stream(self._stream)
        features = Features(*(each / self.n_steps for each in self._sums)) if self._sums else None
        return self._total / self.n_steps, features

    def score(self) -> Score:
        """Return the score of the last validation, for the caller's stream to read."""
        if self._metric.on_device:
            return self._score
        data = self.member.data
        return self._metric.function(self._pred, data.val.labels, n_classes=data.n_classes)

    def _step(self) -> None:
        batch = self._epoch.step_at(self._position)
        # Round to the first again: the warm-up makes more steps than an epoch of a single batch has.
        self._position.add_(1).remainder_(self.n_steps)
        loss, features = step(
            self.member, batch, self._coefficients, loss=self._cohort.loss, precision=self._cohort.precision
        )
        self._total += loss
        for held, value in zip(self._sums_like(features), features or (), strict=True):
            held += value

    def _sums_like(self, features: Features | None) -> list[Tensor]:
        if features is not None and not self._sums:  # in the first step of the warm-up
            self._sums = [torch.zeros_like(value) for value in features]
        return self._sums

    def _validate(self) -> None:
        if self._metric.on_device:
            self._score = self._cohort.validate(self.member)
            return
        member = self.member
        member.prepare_score(precision=self._cohort.precision)
        self._pred = predict(
            member.network,
            member.data.val.images,
            precision=self._cohort.precision,
            takes=self._metric.takes,
            tiles=member.tiles,
        )


def capture(work: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[torch.cuda.Stream], None]:
    """Run a piece of work a few times, capture it, and return what starts it again on a stream."""
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()

    def replay(stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            graph.replay()

    return replay


def _state(member: Member) -> dict[str, Any]:
    """Return copies of all that steps change; an optimizer that has made no step has nothing."""
    return {
        "network": {name: value.clone() for name, value in member.network.state_dict().items()},
        "optimizer": {
            parameter: {name: value.clone() for name, value in state.items()}
            for parameter, state in member.optimizer.state.items()
        },
    }


@torch.no_grad()
def _restore(member: Member, before: dict[str, Any]) -> None:
    """Undo the warm-up in place: the graphs hold these very tensors."""
    for name, value in member.network.state_dict().items():
        value.copy_(before["network"][name])
    for parameter, state in member.optimizer.state.items():
        for name, value in state.items():
            known = before["optimizer"].get(parameter)
            value.copy_(known[name]) if known else value.zero_()
