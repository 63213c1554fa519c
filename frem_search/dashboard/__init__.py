"""Optuna's dashboard on the study's database, behind a gate of our own: it has neither login nor read-only mode.

`server.py` serves it, `gate.py` decides who may see what, `tokens.py` finds the word that opens it, and
`artifact_store.py` shows the files of trials.
"""
