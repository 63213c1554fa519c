"""Training, from the parameters of a trial to its score; nothing here imports Optuna or opens the database.

Read in this order: `recipe.py` checks what a study may train; `objective.py` builds a trial from its parameters;
`trial.py` holds its folds, each a `member.py`; `cohort.py` trains members epoch by epoch and validates them. Within an
epoch, `batches.py` prepares the batches, and `epoch.py` runs the steps and writes the report. `checkpoint.py` stores a
trial on its way, `results.py` what it came to. `image_cache.py` loads images, `resident.py` holds them on the device.
`side_by_side/` has the ways in which members share the device; `single.py` trains one configuration without a search.
"""
