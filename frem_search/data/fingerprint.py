"""What a dataset contains in one number, whatever its file format, folder and size in training."""

import hashlib
import json
from dataclasses import asdict

import numpy as np

from frem_search.data.nnunet import RawDataset


def fingerprint(raw: RawDataset) -> str:
    """Return the SHA-256, in hex, of images, labels, class names, case names and splits.

    Images are hashed as the 32-bit floats that a network sees, so that 8 and 16 bit files of the same numbers agree.
    """
    names = {
        "classes": raw.class_names,
        "cases": [case.name for case in raw.cases],
        "splits": [asdict(split) for split in raw.splits],
    }
    digest = hashlib.sha256(json.dumps(names, sort_keys=True).encode())
    for case in raw.cases:
        digest.update(repr(case.image.shape).encode())
        digest.update(np.ascontiguousarray(case.image, dtype="<f4").tobytes())
        digest.update(np.ascontiguousarray(case.label, dtype=np.uint8).tobytes())
    return digest.hexdigest()
