"""Hyperparameter search for cell-image segmentation, on Optuna and PostgreSQL."""

__version__ = "0.1.0"
__all__ = ["__version__"]
