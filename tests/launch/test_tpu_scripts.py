"""What the launch scripts are made of."""

import ast
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = [
  ROOT / "launch" / "tpu_vm.py",
  *(ROOT / "launch" / "tpu").glob("*.py"),
]
SHELL = [*(ROOT / "launch").rglob("*.sh"), ROOT / ".ci" / "run"]
TRAIN = (
  "--shared_path=/mnt/hour",
  "--",
  "--config=c",
  "--workdir=/mnt/hour/run",
)


def test_all_are_found():
  assert len(PYTHON) > 8
  assert {x.name for x in SHELL} >= {"local.sh", "worker.sh", "run"}


@pytest.mark.parametrize("path", PYTHON, ids=lambda x: x.name)
def test_only_the_standard_library_of_python_3_9(path):
  tree = ast.parse(path.read_text(), feature_version=(3, 9))
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "relative import"
      names.add(node.module.split(".")[0])
  assert names <= sys.stdlib_module_names | {"tpu"}
  assert len(path.read_text().splitlines()) <= 500


def test_shellcheck():
  """One process for all; it follows what is sourced."""
  command = [Path(sys.executable).parent / "shellcheck", "--external-sources"]
  done = subprocess.run(
    [*command, *SHELL], cwd=ROOT, capture_output=True, text=True
  )
  assert not done.returncode, done.stdout


def hosts(accelerator):
  script = (
    "import json, sys; from tpu import accelerators;"
    " print(json.dumps([accelerators.parse(x) for x in sys.argv[1:]]))"
  )
  done = subprocess.run(
    [sys.executable, "-S", "-c", script, *accelerator], text=True, check=True,
    capture_output=True, env={"PYTHONPATH": str(ROOT / "launch")},
  )  # fmt: skip
  return json.loads(done.stdout)


def test_accelerators():
  """Hosts: one up to 8 chips of v5e and v6e, else four chips each."""
  table = [
    ["v5litepod-1", "v2-alpha-tpuv5-lite", 1],
    ["v5litepod-8", "v2-alpha-tpuv5-lite", 1],
    ["v5litepod-16", "v2-alpha-tpuv5-lite", 4],
    ["v5litepod-256", "v2-alpha-tpuv5-lite", 64],
    ["v5p-8", "v2-alpha-tpuv5", 1],
    ["v5p-16", "v2-alpha-tpuv5", 2],
    ["v5p-1024", "v2-alpha-tpuv5", 128],
    ["v6e-4", "v2-alpha-tpuv6e", 1],
    ["v6e-256", "v2-alpha-tpuv6e", 64],
  ]
  assert hosts([row[0] for row in table]) == table


@pytest.mark.parametrize(
  ("verb", "arguments", "commands"),
  [
    ("create", ("--spot",), 5),
    ("setup", (), 2 + 1 + 2 * 2),
    ("run", TRAIN, 2 + 2 + 2),
    ("run", ("--until_done", *TRAIN), 2 + 1 + 2 + 1 + 2 * 2 + 2 + 2),
    ("status", (), 2 + 2),
    ("logs", (), 2 + 2),
    ("logs", ("--follow",), 2 + 2),
    ("stop", (), 2 + 2),
    ("delete", (), 2 + 1),
  ],
)
def test_dry_run(cloud, verb, arguments, commands):
  """Prints every command as a shell takes it, and runs none."""
  done = cloud(verb, "--dry_run", "--accelerator=v5p-16", "--project=mine",
               *arguments)  # fmt: skip
  assert not done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == commands
  for line in lines:
    words = shlex.split(line)
    assert words[0] == "gcloud" or words[:1] == ["bash"]
    assert words[0] == "bash" or "--project=mine" in words
  assert not cloud.calls(all_of_them=True)
  assert not (cloud.root / "gs").exists()


def test_dry_run_is_what_a_run_does(cloud):
  order = ("--accelerator=v6e-8", "--queued")
  for verb in ("create", "setup", "stop", "delete"):
    printed = cloud(verb, "--dry_run", *order).stdout
    cloud(verb, *order)
    assert cloud.calls() == cloud.short(printed), verb
    cloud.forget()


def test_dry_run_is_a_script(cloud):
  cloud("create", "--accelerator=v6e-8")
  cloud.shell(cloud("setup", "--dry_run", "--accelerator=v6e-8").stdout)
  assert "0: none" in cloud("status").stdout
  text = cloud("run", "--dry_run", "--accelerator=v6e-8", *TRAIN).stdout
  cloud.shell(text)
  assert "0: running" in cloud("status").stdout


def documented():
  """Command lines of launch/tpu_vm.py in launch/README.md."""
  text = (ROOT / "launch" / "README.md").read_text().replace("\\\n", " ")
  return [line.strip() for line in text.splitlines()
          if line.strip().startswith("python3 launch/tpu_vm.py ")]  # fmt: skip


def test_documented_commands_are_understood(cloud):
  verbs = set()
  for line in documented():
    words = shlex.split(line)[2:]
    verbs.add(words[0])
    cut = words.index("--") if "--" in words else len(words)
    words[cut:cut] = ["--dry_run", "--accelerator=v5litepod-256"]
    done = cloud(words[0], *words[1:])
    workers = [x for x in done.stdout.splitlines() if " ssh hour " in x]
    assert len(workers) >= 64 or words[0] in ("create", "delete")
  assert verbs == {
    "create", "setup", "run", "status", "logs", "stop", "delete",
  }  # fmt: skip


def test_dry_run_needs_the_type(cloud):
  said = cloud("status", "--dry_run", code=2).stderr
  assert "give --accelerator as well" in said


def test_tunnel(cloud):
  """Only gcloud's alpha commands know it."""
  text = cloud("status", "--dry_run", "--iap", "--accelerator=v6e-1").stdout
  (ssh,) = [x for x in text.splitlines() if " ssh " in x]
  assert ssh.startswith(
    "gcloud alpha compute tpus tpu-vm ssh hour --worker=0 --tunnel-through-iap"
  )
