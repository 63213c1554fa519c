"""Networks that segment images, with their layers, losses and metrics; a trained network as a file and in use.

Nothing here imports study, storage or training. `output.py` and `batch.py` are what networks, losses and metrics share;
`inference.py` predicts and scores in memory, `weights.py` is the file, `evaluate.py` and `predict.py` use it, and
`pictures.py` draws what people look at.
"""
