"""Losses by name: functions of a network's output, the batch, and coefficients that a study may search."""

from frem_search.segmentation.losses.border_cross_entropy import border_cross_entropy
from frem_search.segmentation.losses.feedback_cross_entropy import feedback_cross_entropy
from frem_search.segmentation.losses.loss import Coefficient, Loss
from frem_search.segmentation.losses.smooth_l1 import smooth_l1
from frem_search.segmentation.losses.softmax_cross_entropy import softmax_cross_entropy
from frem_search.segmentation.losses.weighted_cross_entropy import weighted_cross_entropy

__all__ = ["LOSSES", "Coefficient", "Loss"]

LOSSES: dict[str, Loss] = {
    # Between the two values that TPE found for SuperVision: 0.3257 on mouse and 0.2781 on Drosophila (section 4.3).
    "softmax_cross_entropy": Loss(softmax_cross_entropy, {"lambda": Coefficient(0.3)}, auxiliary="supervision = true"),
    "weighted_cross_entropy": Loss(weighted_cross_entropy, {}),
    "feedback_cross_entropy": Loss(
        feedback_cross_entropy,
        {"lambda": Coefficient(0.5)},
        needs_auxiliary=True,
        auxiliary='network = "feedback_unet"',
    ),
    "border_cross_entropy": Loss(
        border_cross_entropy,
        {
            "omega_0": Coefficient(10.0, high=1000.0),
            "sigma_border": Coefficient(5.0, low=0.1, high=1000.0, kind="pixels"),
        },
        needs_border=True,
    ),
    "smooth_l1": Loss(smooth_l1, {}, n_classes=2),
}
