"""Damaged and cut videos: frames read, frames replaced, and errors."""

import numpy as np
import pytest

from hourjax.data.media import video
from hourjax.errors import UserError
from tests import numbered

GROUP = {"g": "20", "bf": "0", "sc_threshold": "0", "preset": "ultrafast"}
ALL = list(range(400))  # of 40 s


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """The same 400 frames in every container."""
  folder = tmp_path_factory.mktemp("whole")
  codecs = {"avi": "mpeg4", "wmv": "wmv2"}
  made = {}
  for suffix in ("mp4", "mkv", "ts", "flv", "avi", "wmv"):
    codec = codecs.get(suffix, "libx264")
    group = GROUP if codec == "libx264" else {"g": "20", "b": "2M"}
    made[suffix] = numbered.write(
      folder / f"a.{suffix}",
      ALL,
      codec=codec,
      codec_options=group,
      options={"movflags": "+faststart"} if suffix == "mp4" else {},
    ).read_bytes()
  return made


def _frame_bytes(path):
  """Where the content of each frame lies in an MP4."""
  import av

  with av.open(str(path)) as container:
    entries = container.streams.video[0].index_entries
    return [(entry.pos, entry.size) for entry in entries]


def _spoil(path, data, frames):
  path.write_bytes(data)
  spoiled = bytearray(data)
  places = _frame_bytes(path)
  for n in frames:
    at, size = places[n]
    spoiled[at + 4 : at + size] = bytes(size - 4)
  path.write_bytes(spoiled)
  return path


@pytest.mark.parametrize("threads", [1, 4])
def test_a_few_damaged_frames_are_replaced(tmp_path, files, threads):
  """So are frames that refer to them, up to the next key frame."""
  path = _spoil(tmp_path / "a.mp4", files["mp4"], [55, 395])
  info, numbers, share = numbered.read(path, threads=threads)
  assert info.frames == 400
  bad = [*range(55, 60), *range(395, 400)]
  assert share == 390 / 400
  assert [numbers[n] for n in ALL if n not in bad] == [
    n for n in ALL if n not in bad
  ]
  # The nearest one before or after; nothing is after the last.
  assert numbers[55:60] == [54, 54, 54, 60, 60]
  assert numbers[395:] == [394] * 5
  # A moment among them.
  assert numbered.number(video.frame_at(path, 39.9, 48)) == 394
  assert numbered.number(video.frame_at(path, 12.3, 48)) == 123


def test_only_what_is_wanted_counts(tmp_path, files):
  path = _spoil(tmp_path / "a.mp4", files["mp4"], range(60, 80))
  reading = video.Reading()
  wanted = [0, 10, 59, 80, 81, 399]
  chunks = video.decode_frames(path, wanted, 48, reading=reading)
  numbers = [numbered.number(frame) for chunk in chunks for frame in chunk]
  assert numbers == wanted and reading.share == 1
  with pytest.raises(UserError, match=r"damaged.* 95.0% of 20 frames|95.0%"):
    list(video.decode_frames(path, [*range(40, 59), 61], 48, min_share=0.951))
  chunks = video.decode_frames(path, [*range(40, 59), 61], 48)
  assert len(np.concatenate(list(chunks))) == 20


@pytest.mark.parametrize("min_share, refused", [(0.95, True), (0.9, False)])
def test_the_share_decides(tmp_path, files, min_share, refused):
  path = _spoil(tmp_path / "a.mp4", files["mp4"], [100, 200])
  if refused:
    message = (
      r"a\.mp4: .*90\.0% of 400 frames can be read, at least 95% must be;"
      r".* --min_share"
    )
    with pytest.raises(UserError, match=message):
      numbered.read(path, min_share=min_share)
  else:
    _, numbers, share = numbered.read(path, min_share=min_share)
    assert share == 0.9 and numbers[:100] == ALL[:100]
    assert numbers[100:110] == [99] * 10 and numbers[110:121] == [
      *[120] * 10,
      120,
    ]


@pytest.mark.slow
def test_twenty_bad_bytes_in_a_long_video(tmp_path):
  """Players show it to 99 %."""
  path = tmp_path / "a.mkv"
  first = numbered.write(
    tmp_path / "w.mkv", range(20), codec_options={**GROUP, "g": "20"}
  )
  rows = numbered.packets(first)
  many = [
    (content, 2000 * turn + pts, 2000 * turn + pts, key, duration)
    for turn in range(250)
    for content, pts, _, key, duration in rows
  ]
  numbered.remux(path, first, many)
  data = bytearray(path.read_bytes())
  rng = np.random.default_rng(0)
  for at in rng.integers(len(data) // 10, len(data) * 9 // 10, 20):
    data[at] ^= 0xFF
  path.write_bytes(data)
  info, numbers, share = numbered.read(path, step=7)
  assert 4900 <= info.frames <= 5000
  assert 0.95 < share < 1
  right = np.mean([n == 7 * i % 20 for i, n in enumerate(numbers)])
  assert right > 0.95


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "avi", "wmv"])
def test_two_thirds_of_a_file(tmp_path, files, suffix):
  data = files[suffix]
  path = tmp_path / f"a.{suffix}"
  path.write_bytes(data[: len(data) * 2 // 3])
  info = video.probe(path)
  assert info.frames == pytest.approx(400, abs=2)
  message = r"frame \d+ is needed, its header counts (400|399|401); 6\d\.\d% of"
  with pytest.raises(UserError, match=message):
    numbered.read(path)
  with pytest.raises(UserError, match=r"6\d\.\d% of"):
    video.check_whole(path, info)
  _, numbers, share = numbered.read(path, min_share=0.5)
  there = int(share * info.frames)
  assert numbers[: there - 1] == ALL[: there - 1]
  assert len(set(numbers[there + 1 :])) == 1  # replaced by the last one


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv"])
def test_a_file_that_lacks_its_last_second(tmp_path, files, suffix):
  data = files[suffix]
  path = tmp_path / f"a.{suffix}"
  path.write_bytes(data[: len(data) * 385 // 400])
  info, numbers, share = numbered.read(path)
  assert info.frames == pytest.approx(400, abs=2)
  assert info.duration == pytest.approx(40, abs=0.2)
  assert 0.955 < share < 0.975
  assert numbers[:380] == ALL[:380]


@pytest.mark.parametrize("suffix", ["mkv", "ts", "flv"])
def test_a_hole(tmp_path, files, suffix):
  """Frames in overwritten bytes count as not read."""
  data = bytearray(files[suffix])
  middle, span = len(data) // 2, len(data) // 40
  data[middle : middle + span] = bytes(span)
  path = tmp_path / f"a.{suffix}"
  path.write_bytes(data)
  info, numbers, share = numbered.read(path, min_share=0.5)
  assert info.frames == pytest.approx(400, abs=2)
  assert info.duration == pytest.approx(40, abs=0.2)
  assert 0.5 < share < 0.99
  off = np.abs(np.array(numbers[:398]) - ALL[:398])
  assert np.mean(off <= 2) > 0.8  # before the hole, and after it
  assert numbers[:150] == ALL[:150]


def test_nothing_can_be_decoded(tmp_path, files):
  path = _spoil(tmp_path / "a.mp4", files["mp4"], range(400))
  with pytest.raises(UserError, match=r"a\.mp4"):
    numbered.read(path)
  with pytest.raises(UserError, match=r"a\.mp4|no frame"):
    numbered.read(path, min_share=0)
  with pytest.raises(UserError, match=r"no frame can be decoded"):
    video.frame_at(path, 3, 48)
