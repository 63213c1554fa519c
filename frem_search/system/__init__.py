"""This computer: folders, files, processes, signals, cores and the device to train on."""
