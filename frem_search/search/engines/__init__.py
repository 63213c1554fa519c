"""Where workers run: processes of this machine (`local.py`), or actors of a Ray cluster (`ray.py`).

`team.py` replaces workers that die, and `watch.py` follows their trials in the database.
"""
