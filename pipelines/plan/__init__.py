"""This package holds what `memscan plan` needs: rates, measured on a sample or recorded, and prices."""
