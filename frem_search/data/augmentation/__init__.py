"""How images change from epoch to epoch.

`order.py` draws the batches of an epoch, `tiles.py` and `orientations.py` make several images of one, `turns.py` turns
and crops, `warp.py` and `elastic.py` deform.
"""
