"""What every side shares: errors, exit codes, run identity, environment names, records, the store, tables.

The launcher and the machine's side never import each other; they meet here, in environment names,
bucket keys and JSON records. Standard library only (fsspec and PyYAML on use).
"""
