"""Run a search: begin a study or join it, take its trials, and do the same with stored trials once more.

`begin.py` gives a `Worker` for a study, `worker.py` takes the trials, `events.py` says what happens to them. `fork.py`
begins a study with the trials of another one; `stored_trial.py` and `rerun.py` train a stored trial again.
"""
