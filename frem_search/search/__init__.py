"""Run a search: begin a study or join it, take its trials; train a stored trial again.

`begin.py` gives a `Worker` for a study, `worker.py` takes the trials, `events.py` says what happens to them, `engines/`
has the places where workers run. `fork.py` begins a study with the trials of another one; `stored_trial.py` and
`rerun.py` train a stored trial again.
"""
