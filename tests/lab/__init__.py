"""A lab on this machine: real SkyPilot on a real Slurm of two nodes, so that preemption can be tried for real.

``python -m tests.lab.up``, ``down``, ``preempt``, ``restore``, ``status``; docs/lab.md says what is real in it.
"""
