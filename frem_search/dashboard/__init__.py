"""Optuna's dashboard on the study's database, behind a gate of our own: it has neither login nor read-only mode."""
