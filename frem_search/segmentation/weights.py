"""The weights file of a trained network: all that scoring and predicting need, as names, numbers and tensors."""

import io
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frem_search.errors import ArtifactError, UsageError
from frem_search.segmentation.metrics import METRICS
from frem_search.segmentation.networks import build_network
from frem_search.system.device import make_repeatable

FORMAT = 3
# What torch.load and the fields of a foreign file stumble over.
UNREADABLE = (
    RuntimeError, pickle.UnpicklingError, struct.error, EOFError, LookupError, TypeError, AttributeError, ValueError,
    ArithmeticError, AssertionError,
)  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Weights:
    """A trained network and where it comes from.

    Args:
        network: A key of `NETWORKS`.
        network_params: The network's, as they were trained.
        in_channels: Channels of the images.
        class_names: Index = label value.
        image_size: What images were resized to; None kept their own size.
        dataset: What it was trained on.
        dataset_fingerprint: Of that dataset's content.
        fold: Which fold of that.
        n_folds: Of how many in a cross-validation; None takes the folds that the dataset comes with.
        score: The metric that the search maximized.
        precision: In which the network was trained and is to be run.
        study: The study's name.
        trial: The trial's number; None if it was trained without a search.
        params: All parameters of the training.
        state: The weights of the best epoch.
    """

    network: str
    network_params: Mapping[str, Any]
    in_channels: int
    class_names: tuple[str, ...]
    image_size: int | tuple[int, int] | None
    dataset: str
    dataset_fingerprint: str
    fold: int
    n_folds: int | None
    score: str
    precision: str
    study: str
    trial: int | None
    params: Mapping[str, Any]
    state: Mapping[str, Tensor]

    @property
    def tiles(self) -> int:
        """Into how many bands of regions, and regions of a band, images are cut to be predicted."""
        return int(self.params.get("tiles", 1))

    @property
    def is_eightfold(self) -> bool:
        """Whether every labelled image stands for eight, one for each orientation."""
        return bool(self.params.get("eightfold", False))

    def build(self, device: torch.device) -> nn.Module:
        """Return the network, ready to predict, in the memory format in which it was trained."""
        make_repeatable(device)
        network = self._untrained("cpu")
        network.load_state_dict(dict(self.state))
        network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network.eval()

    def fits(self) -> bool:
        """Whether the weights have the names and shapes of the network."""
        wanted = {name: value.shape for name, value in self._untrained("meta").state_dict().items()}
        return {name: value.shape for name, value in self.state.items()} == wanted

    def _untrained(self, device: str) -> nn.Module:
        return build_network(
            self.network,
            in_channels=self.in_channels,
            n_classes=len(self.class_names),
            seed=0,
            params=self.network_params,
            device=device,
        )


def dump_weights(weights: Weights) -> bytes:
    """Return the content of the file."""
    content: dict[str, Any] = {field.name: getattr(weights, field.name) for field in fields(weights)}
    content["state"] = {name: value.cpu() for name, value in weights.state.items()}
    buffer = io.BytesIO()
    torch.save({"format": FORMAT} | content, buffer)
    return buffer.getvalue()


def load_weights(content: bytes, *, where: str) -> Weights:
    """Read a weights file; no code of it is run.

    Args:
        content: Of the file.
        where: Its path or URL, for messages.

    Raises:
        ArtifactError: It is torn, or no weights file of frem-search.
    """
    try:
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if stored.pop("format") != FORMAT:
            raise ArtifactError(_unusable(where, f"expected format {FORMAT}"))
        weights = Weights(**stored)
        is_usable = weights.score in METRICS and weights.fits()
    except UNREADABLE as error:
        raise ArtifactError(_unusable(where, f"{type(error).__name__} in {len(content)} bytes")) from error
    except UsageError as error:
        raise ArtifactError(_unusable(where, str(error))) from None
    if not is_usable:
        raise ArtifactError(_unusable(where, "its weights do not fit the network and metric that it names"))
    return weights


def read_weights(path: Path) -> Weights:
    """Read a weights file.

    Raises:
        ArtifactError: It is missing, torn, or no weights file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"{path}: expected a weights file, but got: {error.strerror}. Write one with `frem-search train`."
        raise ArtifactError(message) from None
    return load_weights(content, where=str(path))


def _unusable(where: str, reason: str) -> str:
    return (
        f"{where}: expected a weights file of this version of frem-search, but got another or a torn one: {reason}. "
        "Copy it again, or train anew with `frem-search train`."
    )
