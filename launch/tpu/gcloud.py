"""The gcloud command: retries lost connections, explains refusals."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time

from tpu.errors import LaunchError

# With these a dead connection is noticed in a minute instead of hours.
_SSH_OPTIONS = (
  "ConnectTimeout=20",
  "ServerAliveInterval=15",
  "ServerAliveCountMax=4",
)

# Pattern in gcloud's message, kind of error, explanation with the remedy.
# {zone} and {project} are those of the command.
_MEANINGS = (
  (
    r"(?i)quota\b.*\b(exhausted|exceeded)|exceeded.*\bquota",
    "quota",
    "the project's TPU quota in {zone} is used up or zero; delete what you do"
    " not need (`gcloud compute tpus queued-resources list --zone={zone}`:"
    " suspended and failed requests count too), ask for more (console: IAM &"
    " Admin > Quotas, Cloud TPU API) or take another --zone",
  ),
  (
    r"could not be found in the zonal accelerator|was not found in zone",
    "other",
    "{zone} has no such TPU; `gcloud compute tpus accelerator-types list"
    " --zone={zone}` lists its types: take one of them as --accelerator, or"
    " another --zone",
  ),
  (
    r"no more capacity|Insufficient (reserved )?capacity",
    "capacity",
    "{zone} has no free TPU of this type now; wait in line with --queued, try"
    " --spot, a smaller --accelerator or another --zone",
  ),
  (
    r"SERVICE_DISABLED|has not been used in project|API .*not enabled",
    "other",
    "the Cloud TPU API is off in this project; `gcloud services enable"
    " tpu.googleapis.com compute.googleapis.com`",
  ),
  (
    r"Permission denied on 'locations/|LOCATION_POLICY_VIOLATED",
    "other",
    "there is no zone {zone} for this project; correct --zone (`gcloud compute"
    " tpus locations list`)",
  ),
  (
    r"PERMISSION_DENIED|[Pp]ermission.*denied|does not have permission",
    "other",
    "your account may not do this in {project}; ask its owner for the roles"
    " roles/tpu.admin and roles/iam.serviceAccountUser, or correct --project",
  ),
  (
    r"active account selected|auth login|[Rr]eauthentication|invalid_grant",
    "other",
    "gcloud is not logged in; run `gcloud auth login`",
  ),
  (
    r"property \[project\] is not currently set|\[core/project\]",
    "other",
    "no project is chosen; give --project, or run `gcloud config set project"
    " PROJECT`",
  ),
  (
    r"This TPU has (terminal )?state|while in state|FAILED_PRECONDITION"
    r"|ABORTED",
    "passing",
    "Google is just now changing it; `status` shows how it goes on, try again"
    " in a minute",
  ),
  (r"ALREADY_EXISTS|already exists", "exists", "it exists already"),
  (
    r"NOT_FOUND|was not found|could not be found",
    "missing",
    "{project} has nothing of that name in {zone}; check --name, --zone and"
    " --project, or create it first",
  ),
)

_LOST = re.compile(
  r"return code \[255\]|UNAVAILABLE|DEADLINE_EXCEEDED|RATE_LIMIT_EXCEEDED"
  r"|requests per minute|Failed to establish a new connection"
  r"|Unable to find the server|Connection (timed out|refused|reset|aborted)"
  r"|name resolution|Max retries exceeded|HTTPError 50[0234]"
)

# Lines that gcloud itself prints while a remote command runs.
_CHATTER = ("SSH: ", "SCP: ", "Using ", "Warning: ", "#####", "Updating ")


def own_line(stderr: str) -> str:
  """Returns gcloud's error message on one line, at most 400 characters."""
  _, found, text = stderr.rpartition("ERROR: ")
  message = re.search(r'"message": "((?:[^"\\]|\\.)*)"', text)
  if found and message:
    head = text.split("{")[0]
    text = head + message[1].replace('\\"', '"')
  text = " ".join((text if found else stderr).split())
  return text if len(text) <= 400 else text[:397] + "..."


class Gcloud:
  """Runs gcloud commands in one project and zone.

  Attributes:
    dry_run: print each command, ready for a shell, and run none.
    zone: zone of every command.
  """

  def __init__(
    self,
    *,
    zone: str,
    project: str | None = None,
    dry_run: bool = False,
    attempts: int = 4,
    retry_seconds: float = 10,
    iap: bool = False,
    internal_ip: bool = False,
  ):
    self.dry_run, self.zone = dry_run, zone
    self._project, self._attempts = project, attempts
    self._retry_seconds = retry_seconds
    self._iap, self._internal_ip = iap, internal_ip

  def __call__(self, group: str, verb: str, name: str, *flags: str) -> str:
    """Runs `gcloud compute tpus GROUP VERB NAME`; returns its stdout.

    Raises:
      LaunchError: the command failed; kind "lost" if the network failed in
        every attempt, "missing" if the resource does not exist.
    """
    command = self._command("compute", group, verb, name, *flags)
    return self._attempt(command)

  def ssh(self, node: str, worker: int, command: str) -> str:
    """Runs a shell command on one worker; returns its stdout.

    Raises:
      LaunchError: as `__call__`, or the command failed there (the message
        holds its last line); kind "busy" for exit status 75.
    """
    return self._attempt(self.ssh_command(node, worker, command))

  def ssh_command(self, node: str, worker: int, command: str) -> list[str]:
    """Returns the command line that `ssh` runs."""
    options = [f"--ssh-flag=-o{option}" for option in _SSH_OPTIONS]
    return self._command(
      self._track(), "tpu-vm", "ssh", node, f"--worker={worker}",
      *self._route(), *options, f"--command={command}",
    )  # fmt: skip

  def copy(self, file: str, node: str, worker: int, to: str) -> None:
    """Copies a local file to the path `to` below a worker's home."""
    options = [f"--scp-flag=-o{option}" for option in _SSH_OPTIONS]
    command = self._command(
      self._track(), "tpu-vm", "scp", file, f"{node}:{to}",
      f"--worker={worker}", *self._route(), *options,
    )  # fmt: skip
    self._attempt(command)

  def local(self, command: list[str]) -> None:
    """Runs another program on this machine.

    Raises:
      LaunchError: it failed; the message holds its stderr.
    """
    if self.dry_run:
      print(shlex.join(command))
      return
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      raise LaunchError(f"{shlex.join(command)} failed: {done.stderr.strip()}")

  def say(self, text: str) -> None:
    """Prints a line on stderr with the time of day, except in a dry run."""
    if not self.dry_run:
      print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

  def _track(self) -> str:
    # Only the alpha commands can tunnel.
    return "alpha compute" if self._iap else "compute"

  def _route(self) -> list[str]:
    route = ["--tunnel-through-iap"] if self._iap else []
    return route + (["--internal-ip"] if self._internal_ip else [])

  def _command(
    self, track: str, group: str, verb: str, name: str, *flags: str
  ) -> list[str]:
    project = [f"--project={self._project}"] if self._project else []
    return [
      "gcloud", *track.split(), "tpus", group, verb, name, *flags,
      f"--zone={self.zone}", *project, "--quiet",
    ]  # fmt: skip

  def _attempt(self, command: list[str]) -> str:
    """Runs a command, again while the network fails; returns its stdout."""
    if self.dry_run:
      print(shlex.join(command))
      return ""
    for attempt in range(1, self._attempts + 1):
      done = run(command)
      if not done.returncode:
        return done.stdout
      error = self._error(command, done)
      if error.kind != "lost" or attempt == self._attempts:
        raise error
      wait = self._retry_seconds * 2 ** (attempt - 1)
      self.say(f"connection lost ({error.line}); again in {wait:g} s")
      time.sleep(wait)
    raise AssertionError("at least one attempt is made")

  def _error(
    self, command: list[str], done: subprocess.CompletedProcess
  ) -> LaunchError:
    """Returns the explanation of a failed command."""
    remote = "ssh" in command or "scp" in command
    project = self._project or "the current project"
    line = own_line(done.stderr)
    what = target(command)
    own = not remote or "ERROR: (gcloud" in done.stderr
    if (remote and done.returncode == 255) or (own and _LOST.search(line)):
      advice = "the network here"
      if remote:
        advice = (
          "that it is up (`status`), that the firewall lets tcp:22 in, or give"
          " --iap for machines without an external address"
        )
      message = (
        f"{what}: no connection after {self._attempts} attempts; check"
        f" {advice}, and start again"
      )
      return LaunchError(message, kind="lost", line=line)
    if not own:  # gcloud passes on the exit status of the remote command
      kind = "busy" if done.returncode == 75 else "other"
      message = f"{what}: {_reason(done)} (exit status {done.returncode})"
      return LaunchError(message, kind=kind)
    for pattern, kind, meaning in _MEANINGS:
      if re.search(pattern, line):
        meaning = meaning.format(zone=self.zone, project=project)
        return LaunchError(f"{what}: {meaning}", kind=kind, line=line)
    return LaunchError(
      f"{what}: gcloud failed with status {done.returncode}; try the command"
      f" by hand: {shlex.join(command)}",
      line=line,
    )


def _reason(done: subprocess.CompletedProcess) -> str:
  """Returns the last line that a remote command printed."""
  lines = (done.stdout + done.stderr).splitlines()
  said = [x.strip() for x in lines if x.strip() and not x.startswith(_CHATTER)]
  said = [x for x in said if x.startswith("worker: ")] or said or ["no word"]
  return said[-1].replace("worker: ", "", 1)


def target(command: list[str]) -> str:
  """Returns the resource that a gcloud command names, with its worker."""
  words = command[command.index("tpus") + 3 :]
  names = [word for word in words if not word.startswith("--")]
  worker = [word[9:] for word in words if word.startswith("--worker=")]
  name = names[-1].split(":")[0]
  return f"worker {worker[0]} of {name}" if worker else name


def run(command: list[str]) -> subprocess.CompletedProcess:
  """Runs a command with empty stdin; captures its output as text.

  Raises:
    LaunchError: there is no such program.
  """
  try:
    return subprocess.run(
      command, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
  except FileNotFoundError:
    raise LaunchError(
      f"{command[0]} is not on the PATH; install the Google Cloud CLI and run"
      " `gcloud init`"
    ) from None
