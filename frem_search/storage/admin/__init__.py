"""What the owner of a database does: roles for workers and readers, backups, and PostgreSQL's own programs for them."""
