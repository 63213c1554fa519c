"""Who trains a trial: `claims.py` takes one, `leases.py` reports on it and ends it, `renewal.py` keeps it alive."""
