"""How images change from epoch to epoch.

`order.py` draws the batches of an epoch, `tiles.py` and `orientations.py` make several images of one, `turns.py` says
what a study asks for and turns, `warp.py` crops, rotates and mirrors, `elastic.py` deforms.
"""
