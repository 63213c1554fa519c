"""What is searched: a study file and its space, the sampler and the pruner, the contract, the study read back.

`file.py` reads a study file: the `space.py` of its `parameters.py`, which `samplers.py` and `pruners.py` search.
`stored.py` keeps the contract and compares it. `record.py` reads a stored study as plain data, which `status.py` shows;
`listing.py` lists and deletes stored studies, and `export.py` copies one.
"""
