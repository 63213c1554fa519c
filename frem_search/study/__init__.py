"""What is searched: a study file and its space, the sampler and the pruner, the contract, the study read back.

`file.py` reads a study file with the `space.py` of its parameters; `stored.py` keeps its contract and compares it;
`record.py` reads a stored study as plain data, which `status.py`, `listing.py` and `export.py` show.
"""
