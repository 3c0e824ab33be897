"""Where a run's paid time and money went: engine rows + records in the bucket -> phases -> a report.

``machines``, ``account`` (but for its bills), ``report`` and ``export`` are pure: they know only their arguments.
``index`` and ``collect`` read buckets and engines; ``tables`` and ``page`` show a report.
"""
