"""What outlives a process: the database, the leases of trials and the artifacts.

`database.py` opens the database at the address that `url.py` reads, with the tables of `schema.py`, on the server that
`embedded/` starts if no other is named. `leases/` says who trains a trial, `admin/` is for the owner of a server.
"""
