"""Liver of a transgenic mouse that expresses a fluorescent marker on cell membranes and nuclei, taken in low light.

The first set of the FREM paper: 50 images of 256x256 pixels, three classes. Fluorescence microscopy in low light,
because strong light kills the cells; the paper gives neither microscope nor pixel size. Never published, so it has no
DOI and no stated licence: its owners give it on request.
Source: Imanishi et al. 2018, Cell Structure and Function 43(2):129-140.
Split: 35 images train, 5 validate, 10 test, drawn once with a fixed seed, since the paper names sizes and no images.
"""

from pathlib import Path

from frem_search.data.cases import read_pairs
from frem_search.data.folds import random_split
from frem_search.data.nnunet import write_folder
from frem_search.data.sources.source import Source
from frem_search.errors import DatasetError

N_IMAGES, SIZE = 50, (256, 256)
N_TRAIN, N_VAL, N_TEST = 35, 5, 10
CLASS_NAMES = ("background", "membrane", "nucleus")


def prepare_mouse(source: Path, folder: Path) -> None:
    """Write `source`, which holds `images/` and `labels/` under the same file names, as an nnU-Net folder."""
    cases = read_pairs(source, n_classes=len(CLASS_NAMES))
    if len(cases) != N_IMAGES:
        message = (
            f"{source / 'images'}: expected the {N_IMAGES} images of the mouse set, but got {len(cases)}. "
            "Complete them, or use `frem-search data prepare folder` for another set."
        )
        raise DatasetError(message)
    for case in cases:
        if case.label.shape != SIZE:
            message = (
                f"{source / 'images' / case.name}: expected {SIZE[0]} x {SIZE[1]} pixels, but got "
                f"{case.label.shape[0]} x {case.label.shape[1]}. Use `frem-search data prepare folder` for another set."
            )
            raise DatasetError(message)
    split = random_split([case.name for case in cases], n_train=N_TRAIN, n_val=N_VAL, n_test=N_TEST, seed=0)
    n_channels = len(cases[0].image)
    channel_names = ["fluorescence"] if n_channels == 1 else [f"fluorescence_{i}" for i in range(n_channels)]
    write_folder(
        folder, cases, class_names=CLASS_NAMES, splits=[split], channel_names=channel_names, title=SOURCE.title
    )


SOURCE = Source(
    name="mouse",
    title="Liver of a transgenic mouse, fluorescent membranes and nuclei (50 images, FREM paper)",
    class_names=CLASS_NAMES,
    prepare=prepare_mouse,
    synthesize=None,
    remedy=(
        "These images are not public: ask the authors of Imanishi et al. 2018, Cell Structure and Function "
        "43(2):129-140, then bring a folder with images/ and labels/ by `frem-search data prepare mouse SOURCE`. "
        "Without them, `--dataset mouse_synthetic` or `--quick` runs on generated cells."
    ),
)
