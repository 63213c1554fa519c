"""What the owner of a database does to it: roles for workers and readers, backups."""
