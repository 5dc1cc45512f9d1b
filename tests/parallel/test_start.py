"""How a process learns whether it has companions, without touching a TPU."""

import pytest

from hourjax.errors import UserError
from hourjax.parallel import hosts

GIVEN = {
  "HOURJAX_COORDINATOR": "10.0.0.1:9876",
  "HOURJAX_PROCESSES": "4",
  "HOURJAX_PROCESS": "3",
}


def test_the_environment_says_who_is_who():
  assert hosts.settings_of(GIVEN) == {
    "coordinator_address": "10.0.0.1:9876",
    "num_processes": 4,
    "process_id": 3,
  }


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"HOURJAX_PROCESS": ""}, "but not HOURJAX_PROCESS; set all three or none"),
    ({"HOURJAX_PROCESS": "4"}, "HOURJAX_PROCESS=4 of HOURJAX_PROCESSES=4"),
    ({"HOURJAX_PROCESSES": "four"}, "HOURJAX_PROCESSES=four: must be numbers"),
    ({"HOURJAX_COORDINATOR": "here"}, "HOURJAX_COORDINATOR=here must be host:"),
  ],
)
def test_mistakes_in_it(changes, said):
  with pytest.raises(UserError) as error:
    hosts.settings_of(GIVEN | changes)
  assert said in str(error.value)


@pytest.mark.parametrize(
  "environ, joins",
  [
    # Importing jax says that no TPU is attached.
    ({"TPU_SKIP_MDS_QUERY": "1"}, False),
    ({"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}, False),
    # A TPU VM: jax asks the metadata server for the others.
    ({}, True),
    ({"JAX_PLATFORMS": "tpu,cpu"}, True),
    ({"JAX_PLATFORMS": "cpu"}, False),
    # In a cluster that names the others instead of the metadata server.
    ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"TPU_SKIP_MDS_QUERY": "1", "TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
  ],
)
def test_tpu_hosts_need_no_setting(environ, joins):
  assert hosts.settings_of(environ) == ({} if joins else None)


def test_a_process_alone_agrees_with_itself(monkeypatch):
  assert hosts.agree("") == {} and hosts.agree("no") == {0: "no"}
  assert hosts.tell("yes") == "yes"
  with pytest.raises(UserError, match="mine"), hosts.together():
    raise UserError("mine")
  with pytest.raises(OSError), hosts.leaving():
    raise OSError


def test_a_mistake_of_another_process(monkeypatch):
  monkeypatch.setattr(hosts, "agree", lambda message: {2: "no such file"})
  monkeypatch.setattr(hosts, "count", lambda: 4)
  said = "process 2 of 4: no such file"
  with pytest.raises(UserError, match=said), hosts.together():
    pass
