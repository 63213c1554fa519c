"""Blocks that networks are built of; none of them knows of a cohort, of a study or of another network."""
