"""What the lab needs of the machine: Debian or Ubuntu, root, packages, host names, an account."""

import os
import pwd
import shutil
import subprocess
from pathlib import Path

from tests.lab.layout import LabError, Layout

PACKAGES = "slurm-wlm munge openssh-server openssh-client rsync netcat-openbsd curl procps python3 sudo".split()
HOSTS = Path("/etc/hosts")
FORBID_START = Path("/usr/sbin/policy-rc.d")


def check_machine() -> None:
    """Raises LabError where there can be no lab."""
    if not shutil.which("apt-get") or not Path("/etc/debian_version").exists():
        raise LabError("the lab needs Debian or Ubuntu (it installs Slurm with apt-get); everything else runs without")
    if os.geteuid() != 0:
        raise LabError("the lab needs root (it runs slurmd, munged and sshd, and adds a user and two host names)")


def call(*command: str, **options: object) -> str:
    """A command's output; raises LabError with the last line that it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no word"]
        raise LabError(f"{' '.join(command[:3])} ended with exit code {done.returncode}: {said[-1]}")
    return str(done.stdout)


def install_packages(lab: Layout) -> None:
    """Installs what is missing. Packages stay when the lab goes."""
    listed = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Status}\n", *PACKAGES], capture_output=True, text=True, check=False
    )
    present = {line.split()[0] for line in listed.stdout.splitlines() if line.endswith("ok installed")}
    missing = [name for name in PACKAGES if name not in present]
    if not missing:
        return
    print(f"lab: installing {' '.join(missing)}", flush=True)
    ours = not FORBID_START.exists()  # the packages' own daemons stay down: the lab's have other configurations
    if ours:
        FORBID_START.write_text("#!/bin/sh\nexit 101\n")
        FORBID_START.chmod(0o755)
    try:
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        call("apt-get", "update", "-q", env=environ)
        call("apt-get", "install", "-y", "-q", "--no-install-recommends", *missing, env=environ)
    finally:
        if ours:
            FORBID_START.unlink()


def add_hosts(lab: Layout) -> None:
    """Gives the nodes names. Appends: /etc/hosts may be a mount that cannot be replaced."""
    present = HOSTS.read_text()
    lines = [f"{node.address} {node.name} {lab.mark}\n" for node in lab.nodes]
    with HOSTS.open("a") as hosts:
        hosts.write("".join(line for line in lines if line not in present))


def remove_hosts(lab: Layout) -> None:
    lines = HOSTS.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.rstrip("\n").endswith(lab.mark)]
    if kept != lines:
        HOSTS.write_text("".join(kept))


def find_user(lab: Layout) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(lab.user)
    except KeyError:
        return None


def add_user(lab: Layout) -> pwd.struct_passwd:
    """The account of the jobs, which logs in with the lab's key alone."""
    entry = find_user(lab)
    if entry and entry.pw_dir != str(lab.jobs_home):
        raise LabError(f"there is a user {lab.user} already whose home is {entry.pw_dir}, not {lab.jobs_home}")
    if entry is None:
        call("useradd", "--no-create-home", "--home-dir", str(lab.jobs_home), "--shell", "/bin/bash", lab.user)
        call("usermod", "--password", "*", lab.user)  # no password, yet not locked: keys must work
    return pwd.getpwnam(lab.user)


def remove_user(lab: Layout) -> None:
    entry = find_user(lab)
    if entry and entry.pw_dir == str(lab.jobs_home):
        call("userdel", lab.user)


def may_run(lab: Layout, *command: str) -> bool:
    """Whether the jobs' account can run something."""
    # By way of a shell: setpriv itself still has root's capabilities when it looks for the program.
    as_user = ["setpriv", f"--reuid={lab.user}", f"--regid={lab.user}", "--clear-groups", "--", "sh", "-c", 'exec "$@"']
    as_user.append("sh")
    return subprocess.run([*as_user, *command], capture_output=True, check=False, cwd="/").returncode == 0
