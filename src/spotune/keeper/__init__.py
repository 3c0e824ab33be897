"""The keeper: a small job on a dev cluster that tells work from idling, so that the cluster goes when nobody works.

How it holds SkyPilot off. The skylet's StopEvent (sky/skylet/events.py, every 60 s) counts a cluster as idle when
``job_lib.is_cluster_idle()`` finds no job in its queue and, with ``wait_for: jobs_and_ssh``, no terminal has an sshd
above it (``autostop_lib.has_active_ssh_sessions``). VS Code has no terminal and a Jupyter kernel is neither, so the
keeper is the one thing that SkyPilot counts everywhere: a job. It asks for no GPU, stays in the queue for as long as
somebody works and then for the idle time, and ends; autostop, set to a few minutes, does the rest. A process left
behind by ``setup`` would do on a VM, but on Slurm it dies with its step (sky/provision/slurm/instance.py).

Runs with the machine's own ``python3``, 3.9 or newer, from the standard library alone: it must not depend on the
environment whose setup may be what keeps the machine busy. Linux only: it reads /proc.
"""
