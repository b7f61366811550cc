"""Hosts on one machine, for tests of clusters: each has a network, processes, mounts, a name and an sshd of its own.

Rules:
- Nothing of it is seen outside: the bridge that joins the hosts lies in the operator's network, a space of its own too.
- A host is one process (`unshare --kill-child`): when it ends, the kernel ends all that ran in the host.
- A host has its own `/proc`, so that `ray stop` there sees, and ends, only what runs there; its own `/tmp`, `/run` and home
  folder, which lie in a folder of the test; and this machine's files for the rest. So it needs no installation.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HOME = "/mnt"
"""Home folder of a host's only user, root, so that what lies in this machine's own (a Python, say) stays in sight."""

KEY = "adaptivellm"
"""Name of the ssh key in the operator's `~/.ssh`."""

PROGRAMS = {
    "unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "ssh": "openssh-client",
    "sshd": "openssh-server", "rsync": "rsync",
}  # fmt: skip
"""What is needed, and Debian's package of it."""

SPACES = ("--net", "--pid", "--mount", "--uts", "--ipc")

INIT = """
set -eu
folder=$1 name=$2; shift 2
mount --bind "$folder/home" /mnt
mount --bind "$folder/passwd" /etc/passwd
mount -t tmpfs -o mode=755 run /run
mkdir -m 755 /run/sshd
number=0
for path in "$@"; do  # what the host needs and its own /tmp would hide
    number=$((number + 1))
    mkdir -p "/run/kept/$number"
    mount --bind "$path" "/run/kept/$number"
done
mkdir -p /run/kept/log
mount --bind "$folder/log" /run/kept/log
cp "$folder/sshd_config" "$folder/host_key" /run
chmod 600 /run/host_key
mount -t tmpfs -o mode=1777,size=2g shm /dev/shm
mount --bind "$folder/tmp" /tmp
number=0
for path in "$@"; do
    number=$((number + 1))
    mkdir -p "$path"
    mount --bind "/run/kept/$number" "$path"
done
hostname "$name"
ip link set lo up
/usr/sbin/sshd -D -f /run/sshd_config -E /run/kept/log/sshd.log &
touch /run/kept/log/ready
wait  # and reap: this is the host's process 1
"""

SSHD = """
HostKey /run/host_key
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AuthorizedKeysFile .ssh/authorized_keys
"""


@dataclass(frozen=True, slots=True)
class Host:
    """One of them. `unshare` is the process that ends it, `init` process 1 inside."""

    name: str
    address: str
    folder: Path
    """Holds `home`, `tmp` and `log`, readable from outside."""
    unshare: "subprocess.Popen[bytes]"
    init: int

    def command(self, *words: str) -> list[str]:
        """The command line that runs a command in the host, in its home folder, with a login's environment."""
        environment = [f"HOME={HOME}", "USER=root", "LOGNAME=root", "LANG=C.UTF-8", f"PATH={os.environ['PATH']}"]
        enter = ["nsenter", f"--target={self.init}", *SPACES]
        return [*enter, "env", "--ignore-environment", f"--chdir={HOME}", *environment, *words]

    def run(self, *words: str, limit_s: float = 60, check: bool = True) -> str:
        """Run a command in the host; returns its output, errors among it.

        Raises:
            AssertionError: It failed, with what it said.
        """
        done = subprocess.run(
            self.command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, errors="replace", timeout=limit_s, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{self.name}: {' '.join(words)}: {done.stdout[-4000:]}"
        return done.stdout

    def processes(self) -> list[str]:
        """Command lines of all that runs in the host, but for its process 1 and its sshd."""
        space = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.init:
                continue
            try:
                inside = os.readlink(entry / "ns/pid") == space
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile
                continue
            line = b" ".join(words).decode(errors="replace").strip()
            if inside and line and not line.startswith(("/usr/sbin/sshd", "sshd: ")):
                found.append(line)
        return found


@dataclass(slots=True)
class Network:
    """The operator, who has the ssh key and types commands, and the cluster's hosts."""

    folder: Path
    operator: Host = field(init=False)
    hosts: list[Host] = field(default_factory=list)

    def cut(self, host: Host) -> None:
        """Let nothing reach the host or come from it."""
        self.operator.run("ip", "link", "set", f"to-{host.name}", "down")

    def mend(self, host: Host) -> None:
        self.operator.run("ip", "link", "set", f"to-{host.name}", "up")


def refusal() -> str | None:
    """Why there can be no such hosts here: the missing program, or the probe that failed with what it said."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    for program, package in PROGRAMS.items():
        if shutil.which(program, path=path) is None:
            return f"{program} is missing: install the package {package}"
    if os.geteuid() != 0:
        return "namespaces, addresses and sshd need root"
    for needed in _needed():
        if needed.is_relative_to(HOME):
            return f"{needed} lies in {HOME}, which hosts use as home folder"
    probe = [
        "unshare", *SPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c",
        "ip link add name b type bridge && ip link add name v type veth peer name w && ip link set v master b && "
        "mount -t tmpfs t /run",
    ]  # fmt: skip
    done = subprocess.run(probe, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        return f"`{' '.join(probe)}` failed: {done.stderr.strip()}"
    return None


@contextmanager
def network(folder: Path, names: list[str], *, shared: dict[str, Path]) -> Iterator[Network]:
    """Hosts with the given names, and an operator who reaches them by ssh.

    Args:
        folder: Where their files go.
        shared: Folder in a host's home, such as `.adaptivellm/models`: folder of this machine that is seen there.
    """
    with ExitStack() as stack:
        made = Network(folder)
        made.operator = stack.enter_context(_host(folder, "operator", "10.77.0.1", {}))
        home = made.operator.folder / "home"
        (home / ".ssh").mkdir(mode=0o700)
        made.operator.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f".ssh/{KEY}")
        made.operator.run("ip", "link", "add", "name", "br0", "type", "bridge")
        made.operator.run("ip", "address", "add", f"{made.operator.address}/24", "dev", "br0")
        made.operator.run("ip", "link", "set", "br0", "up")
        for number, name in enumerate(names, start=10):
            host = stack.enter_context(_host(folder, name, f"10.77.0.{number}", shared))
            made.hosts.append(host)
            (host.folder / "home/.ssh").mkdir(mode=0o700)
            shutil.copy(home / f".ssh/{KEY}.pub", host.folder / "home/.ssh/authorized_keys")
            _join(made.operator, host)
        yield made


def _join(operator: Host, host: Host) -> None:
    """Plug a host into the operator's bridge."""
    inside = ["nsenter", f"--target={operator.init}", "--net"]  # process ids as this machine counts them
    port = f"to-{host.name}"
    link = ["ip", "link", "add", "name", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.init)]
    subprocess.run([*inside, *link], check=True, timeout=30)
    operator.run("ip", "link", "set", port, "master", "br0", "up")
    host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
    host.run("ip", "link", "set", "eth0", "up")
    host.run("ip", "route", "add", "default", "via", operator.address)  # by which Ray finds its own address


@contextmanager
def _host(parent: Path, name: str, address: str, shared: dict[str, Path]) -> Iterator[Host]:
    folder = parent / name
    for part, mode in (("home", 0o700), ("tmp", 0o1777), ("log", 0o700)):
        (folder / part).mkdir(parents=True)
        (folder / part).chmod(mode)
    (folder / "sshd_config").write_text(SSHD)
    (folder / "passwd").write_text(
        f"root:x:0:0:root:{HOME}:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    )
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key")]
    subprocess.run(keygen, check=True, timeout=30)
    kept = [str(path) for path in _needed() if path.is_relative_to("/tmp")]
    with (folder / "log/init.log").open("wb") as log:
        unshare = subprocess.Popen(
            ["unshare", *SPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", INIT, "init", folder, name, *kept],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
        )  # fmt: skip
    try:
        end_s = time.monotonic() + 30
        while not (folder / "log/ready").exists():
            said = (folder / "log/init.log").read_text()
            assert unshare.poll() is None, f"{name} did not start: {said}"
            assert time.monotonic() < end_s, f"{name} did not start in 30 s: {said}"
            time.sleep(0.02)
        (init,) = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()
        host = Host(name, address, folder, unshare, int(init))
        for place, source in shared.items():
            host.run("mkdir", "-p", place)
            host.run("mount", "--bind", "-o", "ro", str(source), place)
        yield host
    finally:
        unshare.send_signal(signal.SIGKILL)  # and the kernel all that runs in the host
        unshare.wait(30)


def _needed() -> list[Path]:
    """Folders that a host must see: the project, its environment, and the Python that this was made from."""
    return [Path(__file__).parents[1], Path(sys.prefix), Path(sys.base_prefix)]
