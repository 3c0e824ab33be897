"""Preemption notices that have to be asked for: one source per cloud, one watcher thread for all of them.

Nothing here is imported, and no packet sent, where there is no such cloud (places.py).
"""
