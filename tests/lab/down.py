"""Takes the lab down: no process, account, host name or folder of it is left. Packages stay."""

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil

from spotune.launch.local.machine import is_live
from tests.lab import daemons, machine, slurm
from tests.lab.layout import LabError, Layout

SKY = re.compile(r"(?:\b|-m)sky\.(server|jobs|serve)\b|/bin/sky ")
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sshd")
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")


def down(lab: Layout) -> None:
    """Stops everything first, then removes it."""
    entry = machine.find_user(lab)
    end(processes_of_sky(lab))
    end_jobs(lab)
    for daemon in reversed(daemons.daemons(lab)):
        if process := daemon.process():
            end([process], seconds=10)
    end(processes_of_root(lab))
    if entry and entry.pw_dir == str(lab.jobs_home):
        end([process for process in psutil.process_iter() if _uid(process) == entry.pw_uid])
        remove_files_of(entry.pw_uid)
    machine.remove_user(lab)
    machine.remove_hosts(lab)
    lab.profile.unlink(missing_ok=True)
    remove_files_of_sky(lab)
    subprocess.run(["rm", "-rf", "--", str(lab.root)], check=False)  # a hundred thousand files
    if lab.root.exists():
        raise LabError(f"{lab.root} could not be removed")


def processes_of_sky(lab: Layout) -> list[psutil.Process]:
    """The API server, its workers, the controllers, a client that hangs: and what is below them.

    Not all that has the lab's HOME: a shell that has sourced ``env`` has it too.
    """
    found = {}
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and _is_of_sky(process, lab):
                found |= {each.pid: each for each in [process, *process.children(recursive=True)]}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return list(found.values())


def _is_of_sky(process: psutil.Process, lab: Layout) -> bool:
    words = " ".join(process.cmdline())
    if words.startswith("SkyPilot:"):  # a worker's title, written over its environment
        return any(Path(file.path).is_relative_to(lab.home) for file in process.open_files())
    return bool(SKY.search(words)) and process.environ().get("HOME") == str(lab.home)


def processes_of_root(lab: Layout) -> list[psutil.Process]:
    """Root's own left-overs: steps' managers, and daemons whose pid files are lost. Their words name the lab."""
    names = [str(lab.root), *(node.name for node in lab.nodes)]
    found = []
    for process in psutil.process_iter():
        try:
            if process.name() in PROGRAMS and any(name in word for word in process.cmdline() for name in names):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def end_jobs(lab: Layout) -> None:
    """Cancels Slurm's jobs and waits until their steps are gone."""
    runs = any(daemon.process() for daemon in daemons.daemons(lab) if daemon.name == "slurmctld")
    if not runs or not slurm.jobs(lab):
        return
    slurm.ask(lab, "scancel", "--user", lab.user)
    slurm.ask(lab, "scancel", "--user", "root")
    deadline = time.monotonic() + 20
    while slurm.jobs(lab) and time.monotonic() < deadline:
        time.sleep(0.3)


def end(processes: list[psutil.Process], seconds: float = 5) -> None:
    """SIGTERM, then SIGKILL for whoever is left."""
    for kill in (False, True):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill() if kill else process.terminate()
        deadline = time.monotonic() + seconds
        while (processes := [process for process in processes if is_live(process)]) and time.monotonic() < deadline:
            time.sleep(0.05)


def _uid(process: psutil.Process) -> int:
    try:
        return process.uids().real
    except psutil.NoSuchProcess:
        return -1


def remove_files_of_sky(lab: Layout) -> None:
    """What SkyPilot keeps under fixed names in /tmp, whatever TMPDIR is: ssh's sockets, and logs newer than the lab."""
    sky, env = lab.home / ".sky", lab.root / "env"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(f"/tmp/sky_ssh_{(sky / 'user_hash').read_text().strip()}", ignore_errors=True)
        born = env.stat().st_mtime
        for log in Path("/tmp").glob("*ha_recovery.log"):
            if log.stat().st_mtime >= born:
                log.unlink()


def remove_files_of(uid: int) -> None:
    """What SkyPilot and uv keep in the temporary folders, for the account of the jobs."""
    for folder in TEMPORARY:
        for path in Path(folder).iterdir():
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if status.st_uid != uid:
                continue
            if stat.S_ISDIR(status.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def main() -> int:
    started = time.monotonic()
    try:
        machine.check_machine()
        lab = Layout.read()
        down(lab)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    print(f"lab: down in {time.monotonic() - started:.0f} s, nothing left of it but packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
