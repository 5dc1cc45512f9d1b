"""run --until_done: one training over the deaths of its machines."""

import signal

import pytest

from tests.launch.clouds import until

pytestmark = pytest.mark.slow
DONE = ("--until_done", "--accelerator=v5litepod-16", "--spot",
        "--grace_seconds=0.3")  # fmt: skip
TRAIN = (
  "--shared_path=/mnt/hour",
  "--",
  "--config=c",
  "--workdir=/mnt/hour/run",
)
ASK = (
  "gcloud compute tpus queued-resources create hour"
  " --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"
  " --node-id=hour --spot"
)
DELETE = "gcloud compute tpus queued-resources delete hour --force"


def steps(cloud, name="hour-0"):
  path = cloud.storage(name)
  return int(path.read_text()) if path.exists() else 0


def verbs(cloud):
  """The calls that change something, in short."""
  short = []
  for call in cloud.calls():
    for word in (" start ", " install", " stop ", " delete ", " create "):
      if word in call:
        short.append(word.strip())
  return short


@pytest.mark.parametrize("warn", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_preempted_resumed_done(cloud, warn, late):
  """With or without a SIGTERM, seen from the machine or from the request.

  `late`: the machines end some time before the cloud says why. After a SIGTERM
  the training leaves with 0, as if it were done.
  """
  cloud.plays(futures=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
                       ["PROVISIONING", "ACTIVE"]], workers=2)  # fmt: skip
  grace = "--grace_seconds=4" if late else "--grace_seconds=0.3"
  process = cloud.begin("run", *DONE, grace, *TRAIN)
  until(lambda: steps(cloud) > 3)
  cloud.preempt("hour", warn=warn, vanish=not late)
  if late:
    until(lambda: "waiting to see" in cloud.output())
    with cloud.change() as state:
      state["requests"]["hour"]["states"] = ["SUSPENDING", "SUSPENDED"]
  before = steps(cloud)
  until(lambda: steps(cloud) > before + 3)
  assert f"from step {before}" in cloud.log()
  cloud.storage("finish").touch()
  assert process.wait(90) == 0, cloud.output()
  assert "was taken away; asking for another" in cloud.output()
  assert "training is done" in cloud.output()
  done = verbs(cloud)
  once = ["create", "install", "install"]
  assert [x for x in done if x != "start"] == [*once, "delete", *once]
  # More than these where a machine goes before the cloud says so.
  assert done.count("start") >= 4


@pytest.mark.slow
def test_interrupted_supervisor_takes_the_run_up(cloud):
  process = cloud.begin("run", *DONE, *TRAIN)
  until(lambda: steps(cloud) > 3)
  process.send_signal(signal.SIGINT)
  assert process.wait(90) == 130
  assert "what runs on the TPU goes on" in cloud.output()
  before = steps(cloud)
  until(lambda: steps(cloud) > before)
  process = cloud.begin("run", *DONE, *TRAIN)
  until(lambda: "training on 1 workers" in cloud.output())
  # Another training is not started beside it.
  said = cloud("run", *DONE, *TRAIN, "--config.seed=1", code=2).stderr
  assert "another training" in said
  assert "`stop` it first, or take another --name" in said
  cloud.storage("finish").touch()
  assert process.wait(90) == 0, cloud.output()
  assert verbs(cloud) == ["create", "install", "start"]


@pytest.mark.slow
def test_stopped_by_hand_is_left_alone(cloud):
  process = cloud.begin("run", *DONE, *TRAIN)
  until(lambda: steps(cloud) > 3)
  cloud("stop")
  assert process.wait(90) == 0, cloud.output()
  assert "training was stopped" in cloud.output()
  # And goes on at the same command.
  before = steps(cloud)
  process = cloud.begin("run", *DONE, *TRAIN)
  until(lambda: steps(cloud) > before)
  cloud.storage("finish").touch()
  assert process.wait(90) == 0, cloud.output()


@pytest.mark.slow
@pytest.mark.parametrize(("status", "starts"), [(1, 3), (2, 1)])
def test_training_that_fails(cloud, status, starts):
  """A crash is tried again so many times, a mistake in the options is not."""
  cloud.plays(workers=2)
  cloud.storage("crash").write_text(str(status))
  done = cloud("run", *DONE, "--restarts=2", *TRAIN, code=1)
  assert f"hour:0 ended with {status}; its last lines:" in done.stderr
  assert "Traceback: it broke" in done.stdout
  # The other worker, which waits for the dead one, is ended each time.
  rounds = ["start", "start", "stop", "stop"] * starts
  assert verbs(cloud) == ["create", "install", "install", *rounds]


@pytest.mark.slow
def test_reboot(cloud):
  """Machines that come back without having been taken away."""
  process = cloud.begin("run", *DONE, "--restarts=0", *TRAIN)
  until(lambda: steps(cloud) > 3)
  cloud.preempt("hour", warn=True, vanish=False)
  before = steps(cloud)
  until(lambda: steps(cloud) > before)
  cloud.storage("finish").touch()
  assert process.wait(90) == 0, cloud.output()
  assert verbs(cloud) == ["create", "install", "start", "start"]
  assert "a machine shut down beneath the training" in cloud.output()


@pytest.mark.slow
def test_requests_that_fail(cloud):
  cloud.plays(futures=[["FAILED"]] * 3, why="out of luck")
  said = cloud("run", *DONE, "--restarts=2", *TRAIN, code=2).stderr
  assert said.count("the request failed (out of luck); asking again") == 2
  assert "error: the request for hour failed: out of luck" in said
  assert verbs(cloud) == ["create", "delete", "create", "delete", "create"]


@pytest.mark.slow
def test_quota_ends_it(cloud):
  text = "Quota 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' exhausted."
  cloud.fails("queued-resources.create", text)
  said = cloud("run", *DONE, *TRAIN, code=2).stderr
  assert "TPU quota in us-west4-a is used up" in said
  assert "TPUV5sPreemptibleLitepod" in said


@pytest.mark.slow
def test_passing_trouble(cloud):
  """A lost network, and a state that changes between two questions."""
  process = cloud.begin("run", *DONE, "--attempts=2", *TRAIN)
  until(lambda: steps(cloud) > 3)
  cloud.loses(5)
  until(lambda: "no connection after 2 attempts" in cloud.output())
  cloud.fails("tpu-vm.ssh", 'This TPU has state "DELETING", so it cannot be')
  until(lambda: "Google is just now changing it" in cloud.output())
  cloud.storage("finish").touch()
  assert process.wait(90) == 0, cloud.output()
  assert verbs(cloud) == ["create", "install", "start"]


@pytest.mark.slow
def test_nobody_answers_any_more(cloud):
  cloud("create", "--accelerator=v5litepod-16")
  cloud.loses(999)
  said = cloud(
    "run", *DONE, "--attempts=1", "--poll_seconds=0", *TRAIN, code=2
  ).stderr
  assert "error: worker 0 of hour: no connection after 1 attempts" in said
