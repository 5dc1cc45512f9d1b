"""Renting and giving back, against the fake cloud."""

import pytest

SPOT = ("--accelerator=v5litepod-16", "--queued", "--spot")
PLAIN = ("--accelerator=v6e-8",)
ASK = (
  "gcloud compute tpus queued-resources create hour"
  " --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"
  " --node-id=hour --spot"
)


@pytest.mark.slow
def test_waits_in_line(cloud):
  cloud.plays(
    futures=[
      ["WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "ACTIVE"]
    ]
  )
  said = cloud("create", *SPOT).stderr
  assert cloud.calls() == [ASK]
  states = ("WAITING_FOR_RESOURCES, waiting", "PROVISIONING, waiting", "ACTIVE")
  words = [line.split("hour: ", 1)[1] for line in said.splitlines()
           if "hour: " in line]  # fmt: skip
  assert words == list(states)


@pytest.mark.slow
def test_exists_already(cloud):
  cloud("create", *SPOT)
  assert "hour exists already: ACTIVE" in cloud("create", *SPOT).stderr
  assert cloud.calls() == [ASK]
  # The same name for something else is no such thing.
  said = cloud("create", *PLAIN, code=2).stderr
  assert "hour exists as v5litepod-16, --accelerator is v6e-8" in said
  assert "another --name" in said


@pytest.mark.slow
def test_made_by_another_in_the_meantime(cloud):
  text = "ALREADY_EXISTS: Resource 'hour' already exists"
  cloud.fails("tpu-vm.create", text)
  said = cloud("create", *PLAIN, "--no_wait").stderr
  assert "hour exists already" in said


def test_at_once(cloud):
  cloud("create", *PLAIN, "--project=mine", "--create_flag=--network=vpc")
  assert cloud.calls() == [
    "gcloud compute tpus tpu-vm create hour --accelerator-type=v6e-8"
    " --version=v2-alpha-tpuv6e --network=vpc --project=mine"
  ]
  assert cloud.exists() == ([], ["hour"])


@pytest.mark.slow
def test_slices(cloud):
  cloud("create", "--accelerator=v5p-16", "--num_slices=2", "--reserved")
  assert cloud.calls() == [
    "gcloud compute tpus queued-resources create hour"
    " --accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5"
    " --node-count=2 --node-prefix=hour --reserved"
  ]
  assert cloud.exists() == (["hour"], ["hour-0", "hour-1"])
  cloud("delete")
  assert cloud.exists() == ([], [])


@pytest.mark.slow
def test_request_that_fails(cloud):
  cloud.plays(futures=[["PROVISIONING", "FAILED"]], why="no such network: vpc")
  said = cloud("create", *SPOT, code=2).stderr
  assert "the request for hour failed: no such network: vpc" in said
  assert "`create` again" in said
  # Asked again, the failed one makes room.
  assert "hour is FAILED" in cloud("create", *SPOT).stderr
  delete = "gcloud compute tpus queued-resources delete hour --force"
  assert cloud.calls() == [ASK, delete, ASK]


@pytest.mark.slow
def test_delete_is_repeatable(cloud):
  cloud("create", *PLAIN)
  cloud("delete")
  assert cloud.calls()[1:] == ["gcloud compute tpus tpu-vm delete hour"]
  assert "nothing to delete" in cloud("delete").stderr


QUOTA = (
  "RESOURCE_EXHAUSTED: Quota limit"
  " 'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded."
  " Limit: 0 in zone us-west4-a."
)


@pytest.mark.parametrize(
  ("text", "remedy"),
  [
    (QUOTA, "quota in us-west4-a is used up or zero; delete what you do not"),
    (
      "INVALID_ARGUMENT: Cloud TPU received a bad request. The requested"
      ' accelerator configuration for accelerator type, "v6e-8", could not be'
      ' found in the zonal accelerator configurations for "us-west4-a".',
      "accelerator-types list --zone=us-west4-a",
    ),
    (
      '{\n  "code": 8,\n  "message": "There is no more capacity in the zone'
      ' \\"us-west4-a\\"; you can try in another zone"\n}',
      "wait in line with --queued",
    ),
    (
      "PERMISSION_DENIED: The caller does not have permission. This command is"
      " authenticated as a@b.c",
      "in the current project; ask its owner for the roles roles/tpu.admin",
    ),
    (
      "PERMISSION_DENIED: Permission denied on 'locations/us-west4-a' (or it"
      " may not exist).",
      "there is no zone us-west4-a",
    ),
    (
      "PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before"
      " or it is disabled. reason: SERVICE_DISABLED",
      "gcloud services enable tpu.googleapis.com",
    ),
    ("You do not currently have an active account selected.", "auth login"),
    ("The required property [project] is not currently set.", "give --project"),
    ("INTERNAL: oops", "try the command by hand: gcloud compute tpus tpu-vm"),
  ],
)
@pytest.mark.slow
def test_refusals(cloud, text, remedy):
  cloud.fails("tpu-vm.create", text)
  said = cloud("create", *PLAIN, code=2).stderr.splitlines()
  (error,) = [line for line in said if line.startswith("error: ")]
  assert error.startswith("error: hour: ")
  assert remedy in error
  # And gcloud's own words.
  assert said[-1].startswith("  gcloud: (gcloud.compute.tpus.tpu-vm.create) ")
  assert text.split('"')[0].strip("{\n ").split(".")[0] in said[-1]
  assert len(cloud.calls()) == 1


@pytest.mark.slow
def test_network_that_comes_back(cloud):
  text = "UNAVAILABLE: The service is currently unavailable."
  cloud.fails("queued-resources.describe", text, 3)
  said = cloud("status", code=2).stderr
  assert said.count("connection lost") == 3
  assert "there is no TPU hour in us-west4-a; `create` makes one" in said


@pytest.mark.slow
def test_no_gcloud(cloud):
  cloud.hide_gcloud()
  said = cloud("delete", code=2).stderr
  assert "gcloud is not on the PATH; install the Google Cloud CLI" in said


@pytest.mark.parametrize(
  ("accelerator", "says"),
  [
    ("v5e-256", "Cloud TPU calls v5e-256 v5litepod-256"),
    ("v5litepod-48", "v5litepod-N (v5e), N chips: 1, 4, 8, 16"),
    ("v5p-12", "v5p-N, N cores, two a chip: a multiple of 8"),
    ("v9-8", "--accelerator=v9-8 is none of: v5litepod-N"),
  ],
)
def test_unknown_types(cloud, accelerator, says):
  assert says in cloud("create", f"--accelerator={accelerator}", code=2).stderr
  assert not cloud.calls(all_of_them=True)


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ((), "give --accelerator"),
    (("--accelerator=v6e-8", "--num_slices=0"), "--num_slices=0: at least 1"),
    (("--accelerator=v6e-8", "--", "--steps=3"), "takes nothing after --"),
    (("--accelerator=v6e-8", "--name=Hour"), "lower-case letters"),
    (("--accelerator=v6e-8", "--zone="), "--zone=: it is empty; give a name"),
    (("--accelerator=v6e-8", "--zone=us west"), "no such name is possible"),
    (("--accelerator=v6e-8", "--project="), "--project=: it is empty"),
    (("--acelerator=v6e-8",), "error: unknown option --acelerator; did you mean"
     " --accelerator?"),
    (("--until_done",), "error: unknown option --until_done; "),
    (("--num-slices=2",), "did you mean --num_slices?"),
    (("--parallel=0",), "--parallel: 0 is not at least 1"),
    (("--attempts=few",), "--attempts: invalid whole number value: 'few'"),
    (("--poll_seconds=nan",), "--poll_seconds: nan is not at least 0"),
    (("v6e-8",), "error: unrecognized arguments: v6e-8; options start with --"),
  ],
)  # fmt: skip
def test_mistakes(cloud, arguments, says):
  said = cloud("create", *arguments, code=2).stderr
  assert says in said and said.startswith("error: ") and said.count("\n") == 1
  assert not cloud.calls(all_of_them=True)
