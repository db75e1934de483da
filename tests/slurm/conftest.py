"""A real SLURM of two nodes on this machine, of the system's own packages, private to these tests.

Every daemon has a host name of its own (private mount and uts namespaces over the shared network), so that a node is
what it is on a cluster: a name, and all the processes under it, which die together.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "unshare")
NODES = ("n1", "n2")
PATIENCE_S = 400
PATH = f"{os.environ['PATH']}:/usr/sbin"
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")

CONFIGURATION = """
ClusterName=private
SlurmctldHost=control(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=6
MessageTimeout=5
TCPTimeout=1
SlurmdParameters=config_overrides
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname=n1 Port={port1} CPUs=8
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname=n2 Port={port2} CPUs=8
PartitionName=main Nodes=ALL GraceTime=60 Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """The daemons of a cluster, and its users' commands.

    Args:
        folder: a new one, for everything that the daemons write.
    """

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        left_out = {*OF_LAUNCHERS, *(name for name in os.environ if name.startswith("SLURM_"))}
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        ours = {"PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.environment = kept | ours
        (folder / "state").mkdir()
        (folder / "munge").mkdir(mode=0o700)
        (folder / "plugstack.conf").touch()
        names = " ".join(("control", *NODES))
        (folder / "hosts").write_text(Path("/etc/hosts").read_text() + f"127.0.0.1 {names}\n")
        port, port1, port2 = _free_ports(3)
        (folder / "slurm.conf").write_text(CONFIGURATION.format(
            folder=folder, user=subprocess.check_output(["id", "-un"], text=True).strip(),
            port=port, port1=port1, port2=port2,
        ))  # fmt: skip

    def start(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self._start("munged", ["munged", "--foreground", "--force", "--origin=127.0.0.1", *options])
        _wait_until(lambda: (munge / "socket").exists(), 20, "munged answers")
        self._start("control", self._on_host("control", "slurmctld", "-D"))
        for node in NODES:
            (self.folder / f"spool.{node}").mkdir()
            self.start_node(node)
        idle = lambda: self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False).strip() == "2"  # noqa: E731
        _wait_until(idle, 60, "both nodes are idle")

    def start_node(self, node: str) -> None:
        self._start(node, self._on_host(node, "slurmd", "-D", "-N", node))

    def kill_node(self, node: str) -> None:
        """kill -9 of the daemon and of all that runs on its node, as when the power fails."""
        where = os.stat(f"/proc/{self.daemons[node].pid}/ns/uts").st_ino
        for _ in range(3):  # what was forked in between
            for pid in _processes_under(where):
                os.kill(pid, signal.SIGKILL)
        self.daemons.pop(node).wait()

    def stop(self) -> None:
        for node in (*NODES, "control"):
            if node in self.daemons:
                self.kill_node(node)
        for daemon in self.daemons.values():
            daemon.terminate()
            daemon.wait()

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """What a command of a user prints; it runs in the repository's root."""
        done = subprocess.run(
            command, env=self.environment | environment, cwd=ROOT, text=True, capture_output=True, timeout=60
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        told = self.run("scontrol", "show", "job", "-o", job_id)
        return dict(field.partition("=")[::2] for field in told.split())

    def wait_for(self, what: Callable[[], bool], told: str, log: Path | None = None) -> None:
        """Wait until it holds; a job's log is the failure's message where it does not."""
        _wait_until(what, PATIENCE_S, told, log)

    def wait_for_end(self, job_id: str, log: Path | None = None) -> None:
        """Wait until a job is neither waiting nor running nor on its way out."""
        unfinished = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
        self.wait_for(lambda: self.job(job_id)["JobState"] not in unfinished, f"the end of job {job_id}", log)

    @staticmethod
    def free_ports(number: int) -> list[int]:
        return _free_ports(number)

    def _on_host(self, host: str, *command: str) -> list[str]:
        flags = ["-mu"] if os.getuid() == 0 else ["-Ucmu", "--keep-caps"]
        setup = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        hosts = str(self.folder / "hosts")
        return ["unshare", *flags, "--propagation", "slave", "sh", "-c", setup, "_", host, hosts, *command]

    def _start(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as output:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip


def _processes_under(uts_namespace: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.stat(entry / "ns" / "uts").st_ino == uts_namespace:
                found.append(int(entry.name))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # gone, or not ours
    return found


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _wait_until(what: Callable[[], bool], timeout_s: float, told: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > deadline:
            said = f"\n{log.read_text()[-6000:]}" if log and log.exists() else ""
            pytest.fail(f"not within {timeout_s:.0f} s: {told}{said}")
        time.sleep(0.1)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two idle nodes, `n1` and `n2`; partitions `main` and, preempting it, `urgent`."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        _refuse(f"no SLURM: {', '.join(missing)} not installed (Debian: slurmctld slurmd slurm-client munge)")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    if (tried := subprocess.run(made._on_host("n1", "true"), capture_output=True, text=True)).returncode:
        _refuse(f"no private namespaces here: {tried.stderr.strip()}")
    try:
        made.start()
        yield made
    finally:
        made.stop()


def _refuse(reason: str) -> None:
    if os.environ.get("MEDE2_REQUIRE_SLURM"):
        pytest.fail(reason)
    pytest.skip(reason)
