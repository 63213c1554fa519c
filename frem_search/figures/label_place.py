"""Where the label of a point covers the fewest other points."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

PLOT_PX = (700.0, 470.0)  # about what the axes take of a figure
LABEL_PX = (178.0, 64.0)  # three lines of text
MARKER_PX = 9.0  # from the middle of a marker to its edge, and a little air


class Room(NamedTuple):
    """The place of a label, as pixels from its point to the label's nearest corner, right and down."""

    right_px: float
    down_px: float


def find_room(point: tuple[float, float], others: Sequence[tuple[float, float]]) -> Room:
    """Return the nearest place for a label at which it covers the fewest other points.

    Args:
        point: Where the labelled point lies, as fractions of the two axes.
        others: Where the other points lie.

    >>> find_room((0.9, 0.9), [])
    Room(right_px=-30, down_px=26)
    >>> find_room((0.9, 0.9), [(0.8, 0.8)]) == find_room((0.9, 0.9), [])
    False
    """
    # plotly 6 draws no arrow to a label whose corner is as far right as down. Remove when it does.
    places = [
        Room(right * sign_x, down * sign_y)
        for right, down, sign_x, sign_y in product((30, 80, 140), (26, 76, 136), (1, -1), (-1, 1))
        if is_inside(point, Room(right * sign_x, down * sign_y))
    ]
    return min(places, key=lambda room: (count_covered(point, room, others), abs(room.right_px) + abs(room.down_px)))


def label_box(point: tuple[float, float], room: Room) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the two ends of the label's box across and the two ends up, in pixels from the lower left corner."""
    corner = (point[0] * PLOT_PX[0] + room.right_px, point[1] * PLOT_PX[1] - room.down_px)
    far = (
        corner[0] + (LABEL_PX[0] if room.right_px > 0 else -LABEL_PX[0]),
        corner[1] + (LABEL_PX[1] if room.down_px < 0 else -LABEL_PX[1]),
    )
    return (min(corner[0], far[0]), max(corner[0], far[0])), (min(corner[1], far[1]), max(corner[1], far[1]))


def is_inside(point: tuple[float, float], room: Room) -> bool:
    """Say whether the label's box lies within the axes."""
    across, up = label_box(point, room)
    return across[0] >= 0 and across[1] <= PLOT_PX[0] and up[0] >= 0 and up[1] <= PLOT_PX[1]


def count_covered(point: tuple[float, float], room: Room, others: Sequence[tuple[float, float]]) -> int:
    """Return how many points the label would hide."""
    across, up = label_box(point, room)
    placed = [(x * PLOT_PX[0], y * PLOT_PX[1]) for x, y in others]
    return sum(
        across[0] - MARKER_PX <= x <= across[1] + MARKER_PX and up[0] - MARKER_PX <= y <= up[1] + MARKER_PX
        for x, y in placed
    )
