"""Engines that put workers on machines."""
