"""A member's step and validation as CUDA graphs: all kernels of one are started by a single call."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from frem_search.segmentation.batch import Batch
from frem_search.segmentation.inference import predict_with_loss
from frem_search.segmentation.metrics import METRICS, Score
from frem_search.segmentation.output import Features
from frem_search.training.cohort import Cohort, validation_batch
from frem_search.training.epoch import Trained, end_epoch, step
from frem_search.training.member import EpochReport, Member

WARM_UPS = 2  # steps before a capture: libraries choose kernels and allocate workspaces in the first ones


def train_epoch_graphed(cohort: Cohort, graphs: Sequence["Graphed"]) -> list[EpochReport]:
    """Train members for one epoch, their steps in turn on streams of their own, and validate them."""
    started = time.perf_counter()
    for graph in graphs:
        graph.begin(cohort.begin_epoch(graph.member))
    for i in range(max((graph.n_steps for graph in graphs), default=0)):
        for graph in graphs:
            if i < graph.n_steps:
                graph.step()
    results = [graph.end() for graph in graphs]
    return [_report(cohort, graph, trained, started=started) for graph, trained in zip(graphs, results, strict=True)]


def _report(cohort: Cohort, graph: "Graphed", trained: Trained, *, started: float) -> EpochReport:
    """Wait for a member's stream alone and end its epoch; what its metric raises on the CPU ends that member."""
    try:
        return end_epoch(graph.member, trained=trained, score=graph.score(), started=started)
    except Exception as error:  # noqa: BLE001 whatever the code of a metric raises
        return cohort.ended(graph.member, error)


class Graphed:
    """A member whose step and validation were captured; its network, optimizer and buffers are changed in place.

    Of a metric that runs on the CPU, only the prediction is captured: a graph cannot wait for the device.

    Args:
        cohort: Whose loss, metric and precision are captured.
        member: On a CUDA device, its optimizer capturable.
    """

    def __init__(self, cohort: Cohort, member: Member) -> None:
        self.member, self._cohort = member, cohort
        device = member.data.device
        self._epoch = cohort.begin_epoch(member)  # what the graph reads; the next epochs are copied into it
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        _ = member.loss_weights  # made now: a capture cannot bring numbers to the device
        self._sums: list[Tensor] = []  # of loss, counts and magnitudes over the steps of the epoch
        self._metric = METRICS[cohort.metric]
        self._score: Score
        self._pred: Tensor
        self._loss: Tensor | None
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
        for each in (self._position, *self._sums):
            each.zero_()
        self._stream.wait_stream(torch.cuda.current_stream(self.member.data.device))

    def step(self) -> None:
        """Train on the next batch, not waiting for the device."""
        self._replay_step(self._stream)

    def end(self) -> Trained:
        """Validate; return what the steps showed, for the caller's stream to read."""
        self._replay_validation(self._stream)
        torch.cuda.current_stream(self.member.data.device).wait_stream(self._stream)
        loss, counts, *features = self._sums
        means = Features(*(each / self.n_steps for each in features)) if features else None
        return Trained(loss / self.n_steps, counts.clone(), means)

    def score(self) -> Score:
        """Return the score of the last validation, for the caller's stream to read."""
        if self._metric.on_device:
            return self._score
        data = self.member.data
        score = self._metric.function(self._pred, data.val.labels, n_classes=data.n_classes)
        return score._replace(loss=self._loss)

    def _step(self) -> None:
        batch = self._epoch.step_at(self._position)
        # Round to the first again: the warm-up makes more steps than an epoch of a single batch has.
        self._position.add_(1).remainder_(self.n_steps)
        loss, counts, features = step(self.member, batch, loss=self._cohort.loss, precision=self._cohort.precision)
        values = [loss, counts, *(features or ())]
        self._sums = self._sums or [torch.zeros_like(value) for value in values]  # in the first step of the warm-up
        for held, value in zip(self._sums, values, strict=True):
            held += value

    def _validate(self) -> None:
        if self._metric.on_device:
            self._score = self._cohort.validate(self.member)
            return
        member = self.member
        member.prepare_score(precision=self._cohort.precision)
        whole = validation_batch(member)
        self._pred, self._loss = predict_with_loss(
            member.network,
            whole.image,
            precision=self._cohort.precision,
            takes=self._metric.takes,
            tiles=member.tiles,
            criterion=self._cohort.criterion(member, whole),
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
