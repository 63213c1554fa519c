"""The embedded PostgreSQL, for whoever names no other: its data, its user, its programs, its socket, its life.

`embedded.py` starts it for the first who needs it and stops it after the last; `server.py` is one server on one data
folder. Which folder that is, `place.py` says; `account.py` who runs it, `programs.py` with which programs, and
`sockets.py` where it listens.
"""
