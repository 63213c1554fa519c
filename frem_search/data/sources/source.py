"""What frem-search knows of a named dataset before it lies on disk."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A named dataset and how it comes to lie on disk.

    Args:
        name: The name in a study file and on the command line.
        title: What is shown, in a line.
        class_names: Index = label value.
        prepare: Turns a folder that the user brings into an nnU-Net folder; None for generated sets.
        synthesize: Generates the nnU-Net folder; None for real images.
        remedy: What to do when it is missing.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    prepare: Callable[[Path, Path], None] | None
    synthesize: Callable[[Path], None] | None
    remedy: str
