"""Checkpoints on a small state: what is noticed, kept, said and refused."""

import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.errors import UserError
from hourjax.training import checkpoint_format
from hourjax.training.checkpoint import Checkpoints, restore_params
from hourjax.training.checkpoint_format import checksums
from hourjax.training.optimizer import OptimizerConfig, make_optimizer
from hourjax.training.train_state import TrainState
from hourjax.training.workdir import find_config

STEPS = (3, 6)


def _state(step, seed=0):
  keys = jax.random.split(jax.random.key(seed + step), 3)
  trained = {
    "memaug/a/kernel": jax.random.normal(keys[0], (40, 30)),
    "decoder/b": jax.random.normal(keys[1], (7,)),
  }
  frozen = {"vision/c": jax.random.normal(keys[2], (30, 8), jnp.bfloat16)}
  optimizer = make_optimizer(OptimizerConfig(clip=1.0), 10, trained)
  moments = jax.tree.map(
    lambda x: x + jnp.asarray(step, x.dtype), optimizer.init(trained)
  )
  return TrainState(jnp.int32(step), trained, frozen, moments)


def _write(workdir, steps=STEPS, **options):
  made = Checkpoints(workdir, **options)
  for step in steps:
    made.save(_state(step), 10 * step, "plan", {"seed": 1, "sizes": (1, 2)})
  made.finish()
  made.close()


def _equal(one, two):
  same = jax.tree.map(lambda x, y: bool((x == y).all()), one, two)
  return all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("sound")
  _write(workdir)
  return workdir


@pytest.fixture
def workdir(sound, tmp_path):
  subprocess.run(["cp", "-r", f"{sound}/.", tmp_path / "run"], check=True)
  return tmp_path / "run"


def test_state_position_and_what_it_was_made_with(sound):
  state, position = Checkpoints(sound).restore(_state(0), plan="plan")
  assert position == 60
  assert _equal(state, _state(6))
  assert jax.tree.structure(state) == jax.tree.structure(_state(6))
  about = checkpoint_format.read_manifest(
    checkpoint_format.checkpoint_folder(sound), 6
  )
  assert about["config"] == {"seed": 1, "sizes": [1, 2]}
  assert about["versions"]["jax"] == jax.__version__
  assert set(about["versions"]) > {"flax", "orbax-checkpoint", "hourjax"}
  found = restore_params(sound)
  assert found.step == 6 and found.arrays == about["arrays"]
  assert _equal(found.params, {**_state(6).frozen, **_state(6).trained})


def test_parameters_are_restored_in_parts(sound, monkeypatch):
  """Each is verified and handed over before the next part is read."""
  read = checkpoint_format.read_arrays
  sizes, order = [], []

  def reading(folder, step, like):
    sizes.append(sum(len(group) for group in like.values()))
    return read(folder, step, like)

  def each(path, value):
    order.append((len(sizes), path))
    return np.asarray(value, np.float32)

  monkeypatch.setattr(checkpoint_format, "read_arrays", reading)
  monkeypatch.setattr(checkpoint_format, "_PART", 1)
  found = restore_params(sound, each=each)
  assert sizes == [1, 1, 1]
  assert [number for number, _ in order] == [1, 2, 3]
  expected = {**_state(6).frozen, **_state(6).trained}
  assert set(found.params) == set(expected) == {path for _, path in order}
  for path, value in expected.items():
    assert isinstance(found.params[path], np.ndarray)
    np.testing.assert_array_equal(found.params[path], value)
  sizes.clear()
  monkeypatch.setattr(checkpoint_format, "_PART", 10**9)
  assert _equal(restore_params(sound).params, expected) and sizes == [3]


def test_a_damaged_part_costs_the_whole_checkpoint(workdir, monkeypatch):
  """No parameter of another step stays beside those of the one before."""
  monkeypatch.setattr(checkpoint_format, "_PART", 1)
  sums = checkpoint_format.verify

  def verify(tree, about):
    if about["step"] == 6 and "memaug/a/kernel" in tree.get("trained", {}):
      raise checkpoint_format.DamagedCheckpoint("told so")
    sums(tree, about)

  monkeypatch.setattr(checkpoint_format, "verify", verify)
  found = restore_params(workdir)
  assert found.step == 3
  assert _equal(found.params, {**_state(3).frozen, **_state(3).trained})


def test_shapes_are_enough_to_restore(sound):
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), _state(0)
  )
  state, _ = Checkpoints(sound).restore(like, plan="plan")
  assert _equal(state, _state(6))


def test_only_the_newest_are_kept(tmp_path):
  _write(tmp_path, steps=(1, 2, 3, 4), keep=2)
  assert checkpoint_format.checkpoint_steps(
    checkpoint_format.checkpoint_folder(tmp_path)
  ) == [3, 4]


def _files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _garble(path):
  content = bytearray(path.read_bytes())
  middle = len(content) // 2
  for i in range(middle, min(middle + 8, len(content))):
    content[i] ^= 0x5A
  path.write_bytes(bytes(content))


DAMAGE = {
  "deleted": pathlib.Path.unlink,
  "truncated": _truncate,
  "garbled": _garble,
  "emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGE)
def test_no_damage_of_a_file_changes_what_is_restored(sound, tmp_path, how):
  """Every file in turn: noticed, or harmless, but never other numbers."""
  newest = sound / "checkpoints" / "6"
  noticed = []
  for number, file in enumerate(_files(newest)):
    copy = tmp_path / str(number)
    subprocess.run(["cp", "-r", f"{sound}/.", copy], check=True)
    inside = file.relative_to(newest)
    DAMAGE[how](copy / "checkpoints" / "6" / inside)
    state, position = Checkpoints(copy).restore(_state(0), plan="plan")
    step = int(state.step)
    assert _equal(state, _state(step)) and position == 10 * step
    if step == 3:
      noticed.append(inside)
      assert (copy / "damaged" / "6-1").is_dir()
  names = {path.name for path in noticed}
  assert "metadata" in names and "manifest.ocdbt" in names
  # The files with the arrays' bytes are the largest, and outside of them no
  # number is stored.
  largest = max(_files(newest), key=lambda path: path.stat().st_size)
  assert largest.relative_to(newest) in noticed
  assert not names & {"_sharding", "commit_success.txt"}


@pytest.mark.parametrize(
  "harm, reason",
  [
    ("rm -r 6/*", "about/metadata is missing"),
    ("rm -r 6/state", "state cannot be read"),
    ("rm -r 6/state/ocdbt.process_0/d", "state cannot be read"),
    ("echo '{\"position\": 6' > 6/about/metadata", "cannot be read"),
    ("echo '[]' > 6/about/metadata", "cannot be read"),
    ("sed -i 's/: 60,/: 61,/' 6/about/metadata", "was changed after"),
    ("cp -r 3/state/. 6/state", "arrays are not those that were written"),
  ],
)
def test_the_one_before_is_used_and_said(workdir, capsys, harm, reason):
  folder = workdir / "checkpoints"
  subprocess.run(harm, shell=True, check=True, cwd=folder)
  assert Checkpoints(workdir).latest() == 6
  checkpoints = Checkpoints(workdir)
  state, position = checkpoints.restore(_state(0), plan="plan")
  assert (int(state.step), position) == (3, 30)
  said = capsys.readouterr().err
  assert said.startswith(f"WARNING: {folder}/6 is damaged and now in")
  assert reason in said and "goes on from step 3" in said
  # Steps up to 6 are taken again, and there is room for their checkpoint.
  checkpoints.save(_state(6, seed=5), 60, "plan", {})
  checkpoints.finish()
  checkpoints.close()
  state, _ = Checkpoints(workdir).restore(_state(0), plan="plan")
  assert _equal(state, _state(6, seed=5))


def test_set_aside_twice(workdir):
  for seed in (5, 6):
    (workdir / "checkpoints/6/about/metadata").unlink()
    checkpoints = Checkpoints(workdir)
    checkpoints.restore(_state(0), plan="plan")
    checkpoints.save(_state(6, seed), 60, "plan", {})
    checkpoints.finish()
    checkpoints.close()
  aside = workdir / "damaged"
  assert sorted(path.name for path in aside.iterdir()) == ["6-1", "6-2"]


def test_all_damaged(workdir):
  (workdir / "checkpoints/6/about/metadata").unlink()
  (workdir / "checkpoints/3/state/manifest.ocdbt").unlink()
  with pytest.raises(UserError, match="all 2 checkpoints of") as e:
    Checkpoints(workdir).restore(_state(0), plan="plan")
  assert "\n  6: about/metadata is missing" in str(e.value)
  assert "\n  3: state cannot be read: " in str(e.value)
  # They stay: a run that starts anew over them would be worse than none.
  assert Checkpoints(workdir).latest() == 6
  with pytest.raises(UserError, match="all 2 checkpoints"):
    restore_params(workdir)


def test_evaluation_uses_the_one_before_and_moves_nothing(workdir, capsys):
  (workdir / "checkpoints/6/about/metadata").unlink()
  found = restore_params(workdir)
  assert found.step == 3
  assert _equal(found.params, {**_state(3).frozen, **_state(3).trained})
  assert "checkpoints/6 is damaged" in capsys.readouterr().err
  assert Checkpoints(workdir).latest() == 6


def test_another_model_is_not_damage(workdir):
  other = _state(0)
  other.trained["decoder/b"] = jnp.zeros(8)
  with pytest.raises(UserError, match="does not fit this configuration") as e:
    Checkpoints(workdir).restore(other, plan="plan")
  assert "trained/decoder/b: saved float32 [7], here float32 [8]" in str(
    e.value
  )
  with pytest.raises(UserError, match="rows of plan plan, this run's are new"):
    Checkpoints(workdir).restore(_state(0), plan="new")
  assert not (workdir / "damaged").exists()


def test_a_failing_save_goes_on_or_stops(workdir, capsys, monkeypatch):
  """The disk is full twice; what is half there does not count."""

  def full(*args, **kwargs):
    (workdir / "checkpoints/9.orbax-checkpoint-tmp").mkdir()
    raise OSError(28, "No space left on device")

  checkpoints = Checkpoints(workdir)
  for on_error in ("continue", "stop"):
    checkpoints = Checkpoints(workdir, on_error=on_error)
    with monkeypatch.context() as patch:
      patch.setattr(checkpoints._open(), "save", full)
      checkpoints.save(_state(9), 90, "plan", {})
    if on_error == "stop":
      with pytest.raises(UserError, match="No space left on device"):
        checkpoints.poll()
    else:
      checkpoints.poll()
      said = capsys.readouterr().err
      assert "checkpoint of step 9 could not be saved" in said
      assert "the newest is that of step 6; training goes on" in said
      with pytest.raises(UserError, match="step 9 could not be saved"):
        checkpoints.finish()  # a run must not end well without it
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
      "3",
      "6",
    ]
  # There is room again.
  checkpoints.save(_state(12), 120, "plan", {})
  checkpoints.finish()
  checkpoints.close()
  state, _ = Checkpoints(workdir).restore(_state(0), plan="plan")
  assert _equal(state, _state(12))


def test_a_killed_save_leaves_nothing_that_counts(workdir):
  folder = workdir / "checkpoints"
  (folder / "6").rename(folder / "6.orbax-checkpoint-tmp")
  checkpoints = Checkpoints(workdir)
  assert int(checkpoints.restore(_state(0), plan="plan")[0].step) == 3
  checkpoints.save(_state(6), 60, "plan", {})
  checkpoints.finish()
  checkpoints.close()
  assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]


@pytest.mark.parametrize(
  "harm",
  [
    "rm 3/_CHECKPOINT_METADATA 6/_CHECKPOINT_METADATA",
    "echo '{' | tee 3/_CHECKPOINT_METADATA > 6/_CHECKPOINT_METADATA",
    "truncate -s 0 3/_CHECKPOINT_METADATA 6/_CHECKPOINT_METADATA",
    "rm -r 3/state 3/about",  # killed while it was deleted
    "rm -r 3/*",
  ],
)
def test_what_orbax_says_of_older_ones_stops_no_save(workdir, harm):
  """Nothing of it is needed to go on, so it must not end a run's saves."""
  folder = workdir / "checkpoints"
  subprocess.run(harm, shell=True, check=True, cwd=folder)
  checkpoints = Checkpoints(workdir)
  assert int(checkpoints.restore(_state(0), plan="plan")[0].step) == 6
  for step in (9, 12):
    checkpoints.save(_state(step), 10 * step, "plan", {})
  checkpoints.finish()
  checkpoints.close()
  assert sorted(path.name for path in folder.iterdir()) == ["12", "9"]
  state, _ = Checkpoints(workdir).restore(_state(0), plan="plan")
  assert _equal(state, _state(12))


def test_config_from_a_checkpoint_if_the_file_is_gone(workdir):
  assert find_config(workdir)["seed"] == 1
  (workdir / "config.json").write_text('{"seed": 2}')
  assert find_config(workdir) == {"seed": 2}
  (workdir / "config.json").write_text('{"se')
  assert find_config(workdir)["seed"] == 1
  assert find_config(workdir / "other") is None


def test_checksums_see_any_change():
  x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
  sums = checksums({"a": x, "b": [jnp.zeros(3, jnp.int32), jnp.bool_(True)]})
  assert set(sums) == {"a", "b/0", "b/1"}
  swapped = x.copy()
  swapped[[0, 1]] = swapped[[1, 0]]
  flipped = x.copy()
  flipped.view(np.uint32)[2, 3] ^= 1
  for other in (swapped, flipped, x.T.copy(), -x):
    assert checksums({"a": other})["a"] != sums["a"]
  assert checksums({"a": jnp.asarray(x)}) == {"a": sums["a"]}
  assert checksums({}) == {}
