"""Training, from the parameters of a trial to its score; nothing here knows of Optuna or of the database.

In the order in which a trial meets them: `recipe.py` checks what a study may train, `objective.py` makes a trial of
parameters, `trial.py` holds its folds, `member.py` is one network of it and `cohort.py` are all that share the device.
One epoch of a member: `batches.py` prepares it, `epoch.py` steps and validates, and yields an `EpochReport`.
`checkpoint.py` stores a member, `results.py` scores and keeps it. `single.py` does all this without a search, and
`side_by_side/` has the ways in which members share the device. Images come from `resident.py` by `image_cache.py`.
"""
