"""What `memscan plan` stands on: rates, as measured on a sample or recorded, and prices."""
