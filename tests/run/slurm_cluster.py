"""A real Slurm on this machine: a controller and two virtual nodes, each with its own host name.

Needs root and Debian's packages slurm-wlm and munge. Nothing outside of one directory is touched: own configuration,
own munge key, own ports. `python -m tests.run.slurm_cluster DIRECTORY` runs one until Ctrl-C, to try things by hand.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

NODES = ("node1", "node2")
_GPUS = 4  # per node; null devices, so that scripts that ask for GPUs run unchanged
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

_CONF = """
ClusterName=virtual
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={base}/munge/munge.socket,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
DefMemPerCPU=100
SlurmdTimeout=20
EnforcePartLimits=ALL
GresTypes=gpu
NodeName=node[1-2] NodeHostname=localhost NodeAddr=127.0.1.[1-2] Port=[{first}-{last}] CPUs=32 RealMemory=640000 \
Gres=gpu:{gpus} State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there can be no cluster here; None if there can."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "virtual Slurm nodes need root"
    if subprocess.run(["unshare", "-m", "-u", "true"], capture_output=True, check=False).returncode:
        return "unshare is not permitted here"
    return None


class SlurmCluster:
    """Start it with `start`, and stop it with `stop` whatever happened."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.environment = {**os.environ, "SLURM_CONF": str(base / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SBATCH_", "SRUN_"))]:
            del self.environment[name]
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        base = self.base
        for name in ("munge", "state", "run", "log", "dev", *(f"spool/{node}" for node in NODES)):
            (base / name).mkdir(parents=True, exist_ok=True)
        base.chmod(0o755)  # munged, another user, must reach its directory
        for i in range(_GPUS):
            os.mknod(base / f"dev/gpu{i}", 0o20666, os.makedev(1, 3))
        port = _free_ports(len(NODES) + 1)
        conf = _CONF.format(base=base, port=port, first=port + 1, last=port + len(NODES), gpus=_GPUS)
        (base / "slurm.conf").write_text(conf)
        gres = f"AutoDetect=off\nNodeName=node[1-2] Name=gpu File={base}/dev/gpu[0-{_GPUS - 1}]\n"
        (base / "gres.conf").write_text(gres)
        hosts = "127.0.0.1 localhost\n" + "".join(f"127.0.1.{i} {node}\n" for i, node in enumerate(NODES, 1))
        (base / "hosts").write_text(hosts)
        key = base / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for path in (base / "munge", key):
            shutil.chown(path, "munge", "munge")
        files = {"key-file": "key", "socket": "munge.socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._spawn(
            "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground",
            *(f"--{option}={base}/munge/{name}" for option, name in files.items()),
        )  # fmt: skip
        wait_for(lambda: (base / "munge/munge.socket").exists(), 20, "munged does not start", self.logs)
        self._spawn("slurmctld", "-D")
        for node in NODES:
            own = f"mount --bind {base}/hosts /etc/hosts; hostname {node}; exec slurmd -D -N {node}"
            self._spawn("unshare", "-m", "-u", "bash", "-c", own)
        wait_for(lambda: self._idle() == len(NODES), 60, "the nodes do not become idle", self.logs)

    def stop(self) -> None:
        """End all jobs and daemons."""
        if self._daemons and self._daemons[-1].poll() is None:
            self.run("scancel", "--user=root", "--full", "--signal=KILL", check=False)
            self.run("scancel", "--user=root", check=False)
            time.sleep(1)
        munge, *others = self._daemons or [None]
        for daemon in (*others, munge):
            if daemon is None:
                continue
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []

    def run(self, *command: object, check: bool = True, **environment: str) -> str:
        """Run a Slurm command, or any other that is to find this cluster; returns what it prints."""
        finished = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=120, check=False,
            env={**self.environment, **environment},
        )  # fmt: skip
        if check and finished.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {finished.stdout}{finished.stderr}")
        return finished.stdout

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows about a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", job)))

    def wait(self, job: str, timeout: float = 240) -> dict[str, str]:
        """Wait until a job has ended (not just been requeued)."""
        wait_for(
            lambda: self.job(job)["JobState"] in _ENDED, timeout, f"job {job} does not end", lambda: self.output(job)
        )
        return self.job(job)

    def output(self, job: str) -> str:
        """What a job has written so far, for messages."""
        about = self.job(job)
        path = Path(about.get("StdOut", ""))
        return f"{about}\n{path.read_text(errors='replace') if path.is_file() else '(no output file)'}"

    def processes(self, node: str, containing: str) -> list[int]:
        """The ids of the processes on a node whose command line contains a text."""
        daemon = self._daemons[2 + NODES.index(node)]
        own = os.readlink(f"/proc/{daemon.pid}/ns/uts")
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and os.readlink(entry / "ns/uts") == own:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if containing in command:
                        found.append(int(entry.name))
            except OSError:  # it has ended meanwhile
                continue
        return found

    def logs(self) -> str:
        """The ends of the daemons' logs, for messages."""
        return "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in sorted((self.base / "log").iterdir()))

    def _idle(self) -> int:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return states.count("idle")

    def _spawn(self, *command: str) -> None:
        """Start a daemon; options of setpriv may come before its name."""
        log = (self.base / "log" / f"daemon{len(self._daemons)}.out").open("wb")
        self._daemons.append(
            # They end with this process even if it is killed.
            subprocess.Popen(
                ("setpriv", "--pdeathsig=TERM", *command),
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        )


def wait_for(condition, timeout: float, complaint: str, explain) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{complaint} within {timeout:.0f} s\n{explain()}")
        time.sleep(0.2)


def _free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below those that the kernel gives out."""
    for first in range(17000, 20000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, one in enumerate(sockets):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(("", first + i))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise RuntimeError("no free ports")


if __name__ == "__main__":
    cluster = SlurmCluster(Path(sys.argv[1]).resolve())
    try:
        cluster.start()
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        stop = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, stop)
        signal.sigwait(stop)
    finally:
        cluster.stop()
