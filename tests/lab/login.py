"""The login node: an sshd of the lab on loopback, by which SkyPilot reaches Slurm as the jobs' account."""

import shutil
from pathlib import Path

from tests.lab.layout import Layout
from tests.lab.machine import add_user, call

SERVER = """\
ListenAddress 127.0.0.1
Port {lab.ssh_port}
HostKey {lab.etc}/host_key
PidFile {lab.run}/sshd.pid
AllowUsers {lab.user}
UsePAM no
PasswordAuthentication no
StrictModes no
PrintMotd no
MaxStartups 200
MaxSessions 200
SetEnv SLURM_CONF={lab.slurm_conf} SPOTUNE_LAB_PROGRAMS={lab.programs} PATH={lab.programs}:/usr/local/bin:/usr/bin:/bin
Subsystem sftp internal-sftp
"""

# What SkyPilot reads to find Slurm clusters: each Host is one.
CLIENT = """\
Host lab
    HostName 127.0.0.1
    Port {lab.ssh_port}
    User {lab.user}
    IdentityFile {lab.home}/.ssh/lab
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
"""

# A login shell sets PATH anew; only sessions of the lab have the name.
PROFILE = '[ -z "${SPOTUNE_LAB_PROGRAMS:-}" ] || PATH="$SPOTUNE_LAB_PROGRAMS:$PATH"\n'


def configure(lab: Layout) -> None:
    """Keys, the server's and the client's configuration, the account that logs in."""
    entry = add_user(lab)
    for folder in (lab.home / ".ssh", lab.home / ".slurm", lab.jobs_home / ".ssh"):
        folder.mkdir(parents=True, exist_ok=True)
    _make_key(lab.home / ".ssh" / "lab")
    _make_key(lab.etc / "host_key")
    shutil.copy(lab.home / ".ssh" / "lab.pub", lab.jobs_home / ".ssh" / "authorized_keys")
    for name in (".hushlogin", ".bashrc"):
        (lab.jobs_home / name).touch()
    for path in (lab.jobs_home, *lab.jobs_home.iterdir(), lab.jobs_home / ".ssh" / "authorized_keys"):
        shutil.chown(path, entry.pw_uid, entry.pw_gid)
    (lab.jobs_home / ".ssh").chmod(0o700)
    lab.home.chmod(0o700)
    (lab.etc / "sshd_config").write_text(SERVER.format(lab=lab))
    (lab.home / ".slurm" / "config").write_text(CLIENT.format(lab=lab))
    lab.profile.write_text(PROFILE)


def _make_key(path: Path) -> None:
    if not path.exists():
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "spotune-lab", "-f", str(path))


def log_in(lab: Layout) -> str:
    """Logs in as SkyPilot does; raises LabError when that fails."""
    config = str(lab.home / ".slurm" / "config")
    return call("ssh", "-F", config, "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "lab", "sinfo", "-h")
