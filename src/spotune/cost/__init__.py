"""Where a run's paid time and money went: engine rows + records in the bucket -> phases -> a report.

The core (``phases``, ``join``, ``money``, ``account``, ``report``) is pure: all it knows is an argument. ``read`` and
``ledger.write_bills`` are its edge to the bucket; ``table``, ``rows`` and ``page`` show a report that is made.
"""
