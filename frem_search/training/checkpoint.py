"""A member as bytes, and back: what a trial needs to go on where it was, on any worker."""

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import torch

from frem_search.training.member import Member

FORMAT = 1
DIGEST_BYTES = 32
STATE = ("epoch", "best_score", "best_epoch", "best_per_class", "best_weights", "curve")


def dump_checkpoint(member: Member, *, identity: Mapping[str, Any]) -> bytes:
    """Return weights, optimizer, progress, curve and best weights of a member.

    Nothing random is stored: batches, turns and enhanced maps follow from seed, fold and epoch.

    Args:
        member: The member.
        identity: What must be equal for the checkpoint to be used again: plain values only.
    """
    buffer = io.BytesIO()
    content = {
        "format": FORMAT,
        "identity": dict(identity),
        "network": member.network.state_dict(),
        "optimizer": member.optimizer.state_dict(),
    } | {name: getattr(member, name) for name in STATE}
    torch.save(content, buffer)
    # torch.load would take a flipped bit for a weight: PyTorch's zip reader does not look at the checksums.
    packed = buffer.getvalue()
    return packed + hashlib.sha256(packed).digest()


def load_checkpoint(member: Member, content: bytes, *, identity: Mapping[str, Any]) -> bool:
    """Bring a fresh member to where the checkpoint was taken.

    Returns:
        Whether it could be used; a torn, foreign or older one leaves the member as it was.
    """
    packed, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if digest != hashlib.sha256(packed).digest():
        return False
    device = next(member.network.parameters()).device
    stored = torch.load(io.BytesIO(packed), map_location=device, weights_only=True)
    if stored["format"] != FORMAT or stored["identity"] != dict(identity):
        return False
    fresh = member.network.state_dict()
    if {n: v.shape for n, v in stored["network"].items()} != {n: v.shape for n, v in fresh.items()}:
        return False
    member.network.load_state_dict(stored["network"])
    member.optimizer.load_state_dict(stored["optimizer"])
    for name in STATE:
        setattr(member, name, stored[name])
    return True
