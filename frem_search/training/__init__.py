"""Training, from resident images to epoch reports; nothing here knows of the search."""
