"""A gcloud that plays Cloud TPU in a folder, for tests of launch/tpu_vm.py.

$FAKE_CLOUD/cloud.json holds what exists and what is to happen; calls.jsonl gets
every command line. A worker is a folder with a shell: what ssh is given, runs
there for real. Flags are those of gcloud 528's release track GA, messages are
what it and the API say.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(os.environ["FAKE_CLOUD"])
CREATE = {"accelerator-type", "spot", "reserved", "network", "zone", "project",
          "quiet", "service-account"}  # fmt: skip
SHORT = {"zone", "project", "quiet"}
SSH = SHORT | {"worker", "internal-ip", "command", "ssh-flag"}
FLAGS = {
  ("queued-resources", "create"): CREATE
  | {"runtime-version", "node-id", "node-count", "node-prefix",
     "valid-until-duration"},
  ("queued-resources", "describe"): SHORT | {"format"},
  ("queued-resources", "delete"): SHORT | {"force", "async"},
  ("tpu-vm", "create"): CREATE | {"version"},
  ("tpu-vm", "describe"): SHORT | {"format"},
  ("tpu-vm", "delete"): SHORT | {"async"},
  ("tpu-vm", "ssh"): SSH,
  ("tpu-vm", "scp"): SHORT | {"worker", "internal-ip", "scp-flag"},
}  # fmt: skip


@contextlib.contextmanager
def cloud():
  """What there is, to be changed by one at a time."""
  with open(ROOT / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    path = ROOT / "cloud.json"
    state = json.loads(path.read_text())
    yield state
    path.write_text(json.dumps(state, indent=1))


def fail(command, text, code=1):
  print(f"ERROR: (gcloud.compute.tpus.{command}) {text}", file=sys.stderr)
  sys.exit(code)


def main(argv):
  with open(ROOT / "calls.jsonl", "a") as file:
    file.write(json.dumps(["gcloud", *argv]) + "\n")
  words = [word for word in argv if not word.startswith("--")]
  if words[0] == "alpha":
    words = words[1:]
    for verb in ("ssh", "scp"):
      FLAGS["tpu-vm", verb] |= {"tunnel-through-iap"}
  flags = {}
  for word in argv:
    if word.startswith("--"):
      name, _, value = word[2:].partition("=")
      flags[name] = value
  _, _, group, verb, *rest = words
  command = f"{group}.{verb}"
  unknown = set(flags) - FLAGS[group, verb]
  if unknown:
    fail(command, f"unrecognized arguments: --{sorted(unknown)[0]}", 2)
  errors(command, flags)
  handler = globals()[command.replace(".", "_").replace("-", "_")]
  handler(command, flags, *rest)


def errors(command, flags, when="before"):
  """Fails if the scenario says so, as often as it says.

  Args:
    when: the command has run; "cut": after two lines of what it prints.
  """
  with cloud() as state:
    for error in state["errors"]:
      fits = error["command"] == command and error["times"] > 0
      where = all(text in sys.argv[1:] or text in flags.get("command", "")
                  for text in error.get("where", ()))  # fmt: skip
      if not fits or not where or error.get("when", "before") != when:
        continue
      error["times"] -= 1
      break
    else:
      return
  if when == "cut":
    with shell(flags, stdout=subprocess.PIPE, text=True) as process:
      for _ in range(2):
        print(process.stdout.readline(), end="", flush=True)
      process.kill()
  fail(command, error["text"], error.get("code", 1))


def missing(command, kind, name):
  where = f"projects/p/locations/z/{kind}/{name}"
  fail(command, f"NOT_FOUND: Resource '{where}' was not found")


def make_nodes(state, request):
  count = len(request["nodes"])
  for node in request["nodes"]:
    state["nodes"][node] = {
      "state": "READY", "acceleratorType": request["type"],
      "networkEndpoints": [{"ipAddress": f"10.0.0.{i}"}
                           for i in range(state["workers"])],
    }  # fmt: skip
    for i in range(state["workers"]):
      (ROOT / "workers" / node / str(i)).mkdir(parents=True)
  return count


def queued_resources_create(command, flags, name):
  with cloud() as state:
    if name in state["requests"]:
      fail(command, f"ALREADY_EXISTS: Resource '{name}' already exists")
    nodes = [flags.get("node-id")]
    if "node-count" in flags:
      prefix = flags["node-prefix"]
      nodes = [f"{prefix}-{i}" for i in range(int(flags["node-count"]))]
    states = state["futures"].pop(0) if state["futures"] else ["ACTIVE"]
    state["requests"][name] = {
      "states": states, "nodes": nodes, "type": flags["accelerator-type"],
      "prefix": flags.get("node-prefix"),
    }  # fmt: skip


def queued_resources_describe(command, flags, name):
  with cloud() as state:
    request = state["requests"].get(name)
    if request is None:
      missing(command, "queuedResources", name)
    now = request["states"][0]
    if len(request["states"]) > 1:
      request["states"].pop(0)
    if now == "ACTIVE" and not set(request["nodes"]) & set(state["nodes"]):
      make_nodes(state, request)
    spec = {"node": {"acceleratorType": request["type"]}}
    if request["prefix"]:
      spec["multisliceParams"] = {
        "nodeCount": len(request["nodes"]), "nodeIdPrefix": request["prefix"],
      }  # fmt: skip
    else:
      spec["nodeId"] = request["nodes"][0]
    answer = {
      "name": name,
      "state": {"state": now},
      "tpu": {"nodeSpec": [spec]},
    }
    if now == "FAILED":
      answer["state"]["failedData"] = {"error": {"message": state["why"]}}
  print(json.dumps(answer))


def queued_resources_delete(command, flags, name):
  with cloud() as state:
    request = state["requests"].pop(name, None)
    if request is None:
      missing(command, "queuedResources", name)
    for node in request["nodes"]:
      remove(state, node)


def remove(state, node):
  if state["nodes"].pop(node, None):
    shutil.rmtree(ROOT / "workers" / node, ignore_errors=True)


def tpu_vm_create(command, flags, name):
  with cloud() as state:
    if name in state["nodes"]:
      fail(command, f"ALREADY_EXISTS: Resource '{name}' already exists")
    make_nodes(state, {"nodes": [name], "type": flags["accelerator-type"]})


def tpu_vm_describe(command, flags, name):
  with cloud() as state:
    if name not in state["nodes"]:
      missing(command, "nodes", name)
    print(json.dumps(state["nodes"][name]))


def tpu_vm_delete(command, flags, name):
  with cloud() as state:
    if name not in state["nodes"]:
      missing(command, "nodes", name)
    remove(state, name)


def home(command, flags, node):
  with cloud() as state:
    if node not in state["nodes"]:
      missing(command, "nodes", node)
    now = state["nodes"][node]["state"]
  if now != "READY":
    fail(command, f'This TPU has terminal state "{now}", so it cannot be used'
         " anymore.")  # fmt: skip
  return ROOT / "workers" / node / flags["worker"]


def tpu_vm_ssh(command, flags, node):
  folder = home(command, flags, node)
  verb, worker = command.split(".")[1].upper(), flags["worker"]
  print(f"{verb}: Attempting to connect to worker {worker}...", file=sys.stderr,
        flush=True)  # fmt: skip
  flags["home"] = folder
  errors(command, flags, "cut")
  with shell(flags, start_new_session=True) as process:
    code = process.wait()
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)  # what has not detached itself
  errors(command, flags, "after")
  sys.exit(code)


def shell(flags, **more):
  """Runs a command in the home of a worker."""
  environment = {
    "HOME": str(flags["home"]), "PATH": os.environ["FAKE_PATH"],
    "PYTHON": str(ROOT / "python"), "FAKE_CLOUD": str(ROOT),
  }  # fmt: skip
  command = ["bash", "-c", flags["command"]]
  return subprocess.Popen(command, cwd=flags["home"], env=environment, **more)


def tpu_vm_scp(command, flags, source, to):
  node, _, path = to.partition(":")
  shutil.copy(source, home(command, flags, node) / path)


main(sys.argv[1:])
