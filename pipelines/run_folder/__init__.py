"""A run's folder: manifest, parts, commit records, the lease, rows that hurt, and what it says while it is written."""
