"""A lab on this machine: real SkyPilot on a real Slurm of two nodes, so that preemption can be tried for real.

``python -m tests.lab.up``, ``down``, ``preempt``, ``restore``, ``status``. What is real in it:
docs/contributing/lab.md.
"""
