"""The guard: the process in front of training. Claims the attempt, restores, starts the ranks, uploads and
commits what they save, owns signals, records and the exit code. Standard library and fsspec only, so that
an out-of-memory kill or a hung collective cannot take any of that with it.
"""
