"""One file for each dataset that has a name: where its images come from, and what becomes a case of it."""
