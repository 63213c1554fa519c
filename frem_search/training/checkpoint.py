"""A trial in training as bytes, and back: what it needs to go on where it was, on any worker."""

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from frem_search.segmentation.weights import UNREADABLE
from frem_search.system.device import is_of_device
from frem_search.training.member import CURVE_COLUMNS, MAGNITUDES, Member
from frem_search.training.trial import Folds

FORMAT = 2
DIGEST_BYTES = 32
STATE = ("epoch", "best_score", "best_epoch", "best_per_class", "best_weights", "curve")


def dump_checkpoint(folds: Folds, *, identity: Mapping[str, Any]) -> bytes:
    """Return weights, optimizer, progress, curve and best weights of each fold of a trial.

    Nothing random is stored: batches, turns and enhanced maps follow from seed, fold and epoch.

    Args:
        folds: The trial.
        identity: What must be equal for the checkpoint to be used again: plain values only.
    """
    buffer = io.BytesIO()
    content = {
        "format": FORMAT,
        "identity": dict(identity),
        "image_scores": folds.image_scores,
        "folds": [_dump(member) for member in folds.members],
    }
    torch.save(content, buffer)
    # torch.load would take a flipped bit for a weight: PyTorch's zip reader does not look at the checksums.
    packed = buffer.getvalue()
    return packed + hashlib.sha256(packed).digest()


def load_checkpoint(folds: Folds, content: bytes, *, identity: Mapping[str, Any]) -> bool:
    """Bring a fresh trial to where the checkpoint was taken.

    Returns:
        Whether it could be used; a torn, foreign or older one leaves the trial as it was.
    """
    packed, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if digest != hashlib.sha256(packed).digest():
        return False
    device = folds.members[0].data.device
    try:
        stored = torch.load(io.BytesIO(packed), map_location=device, weights_only=True)
        if not _is_of(folds, stored, identity):
            return False
    except UNREADABLE as error:
        if is_of_device(error):
            raise
        return False
    for member, state in zip(folds.members, stored["folds"], strict=True):
        member.network.load_state_dict(state["network"])
        member.optimizer.load_state_dict(state["optimizer"])
        for name in STATE:
            setattr(member, name, state[name])
        member.curve = _as_known_today(member.curve)
    folds.image_scores = stored["image_scores"]
    return True


def _as_known_today(curve: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Return a curve without what earlier versions did not measure, or measured elsewhere: magnitudes behind a gate."""
    is_earlier = "train_iou" not in curve
    return {
        column: [None] * len(curve["epoch"])
        if column not in curve or (is_earlier and column in MAGNITUDES)
        else curve[column]
        for column in CURVE_COLUMNS
    }


def _dump(member: Member) -> dict[str, Any]:
    state = {"network": member.network.state_dict(), "optimizer": member.optimizer.state_dict()}
    return state | {name: getattr(member, name) for name in STATE}


def _is_of(folds: Folds, stored: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether all of it can be loaded: nothing is to fail when half of a trial is there."""
    if stored["format"] != FORMAT or stored["identity"] != dict(identity):
        return False
    states = stored["folds"]
    is_whole = "image_scores" in stored and all(name in state for state in states for name in STATE)
    return is_whole and len(states) == len(folds.members) and all(map(_fits, folds.members, states))


def _fits(member: Member, state: Mapping[str, Any]) -> bool:
    weights, groups = _shapes(member.network.state_dict()), member.optimizer.state_dict()["param_groups"]
    shapes = [parameter.shape for parameter in member.network.parameters()]
    stored = state["optimizer"]
    return (
        _shapes(state["network"]) == weights
        and _shapes(state["best_weights"]) in ({}, weights)  # none before the first epoch with a score
        and [group["params"] for group in stored["param_groups"]] == [group["params"] for group in groups]
        and all(of["exp_avg"].shape == of["exp_avg_sq"].shape == shapes[i] for i, of in stored["state"].items())
    )


def _shapes(values: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in values.items()}
