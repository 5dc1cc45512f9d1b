"""Keys of a record that hold its media, and keys that must not be ignored."""

import pytest

from hourjax.data.records.record import parse_record
from hourjax.errors import UserError

TALK = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ann."}]


def _parse(**fields):
  return parse_record({"id": "r", "conversations": TALK, **fields}, "here")


READ = [
  ({"video": "a.mp4"}, "video", ("a.mp4",)),
  ({"videos": ["a.mp4"]}, "video", ("a.mp4",)),
  ({"videos": "a.mp4", "images": []}, "video", ("a.mp4",)),
  ({"video_path": "a.mp4", "image": None}, "video", ("a.mp4",)),
  ({"Video": "a.mp4"}, "video", ("a.mp4",)),
  ({"video_file": "a", "video": None}, "video", ("a",)),
  ({"images": ["a.png", "b.png"]}, "image", ("a.png", "b.png")),
  ({"image_path": "a.png"}, "image", ("a.png",)),
  ({"IMAGE": "a.png"}, "image", ("a.png",)),
  ({"video": "", "image": "a.png"}, "image", ("a.png",)),
  ({"video": ["a.mp4"], "image": []}, "video", ("a.mp4",)),
  # Two keys of one file.
  ({"video": "x/a.mp4", "video_path": "/data/x/a.mp4"}, "video", ("x/a.mp4",)),
  ({"image": "a.png", "images": ["a.png"]}, "image", ("a.png",)),
  # What is beside a medium that is read does no harm.
  ({"video": "a.mp4", "thumbnail": "a.jpg"}, "video", ("a.mp4",)),
  ({"image": "a.png", "clip": "b.mp4"}, "image", ("a.png",)),
  ({"video": "a.mp4", "has_audio": "yes"}, "video", ("a.mp4",)),
]


@pytest.mark.parametrize("given, modality, media", READ)
def test_media_that_are_read(given, modality, media):
  record = _parse(**given)
  assert (record.modality, record.media) == (modality, media)
  repaired = f"{modality} under another key" in record.repairs
  assert repaired == (given.get(modality) is None)


TEXT = [
  {"task": "math", "score": 1.5, "source": "web"},
  {"image": None, "video": None, "videos": [], "images": "", "clip": None},
  {"image_width": 3, "num_images": 0, "has_image": False, "video_count": 2},
  {"media_type": "text", "image_caption": "a cat", "images_description": "b"},
  {"framework": "jax", "metadata": {"dataset": "raven", "split": "train"}},
  {"choice_list": None, "url": "https://example.org/page"},
]


@pytest.mark.parametrize("given", TEXT, ids=lambda g: next(iter(g)))
def test_text_stays_text(given):
  assert _parse(**given).modality == "text"


LOST = [
  {"clip": "x"},
  {"media": "a"},
  {"media": {"kind": "video", "name": "a"}},
  {"video_id": "dQw4w9"},
  {"image_id": 12},
  {"imgUrl": "x"},
  {"frames": ["1", "2"]},
  {"source_video": "x"},
  {"videoPath": "x"},
  {"pixel_values": "x"},
  {"vid": "x"},
  {"audio": "a"},
  {"file": "in/a.mp4"},
  {"path": "A.JPG"},
  {"input": {"files": ["x", "y.webm"]}},
  {"url": "https://example.org/a.png?size=3"},
  {"sound": "a.wav"},
]


@pytest.mark.parametrize("given", LOST, ids=str)
def test_a_record_with_an_unknown_medium_is_never_text(given):
  key = next(iter(given))
  with pytest.raises(
    UserError, match=f"{key}.*neither 'video' nor 'image'|not"
  ):
    _parse(**given)


BAD = [
  ({"video": "", "image": []}, "both 'video'"),
  ({"video": "a.mp4", "images": ["a.png"]}, "both 'video' .* and 'images'"),
  ({"video_path": "a.mp4", "image": "b.png"}, "both 'video_path'"),
  ({"video": "a.mp4", "video_path": "b.mp4"}, "'video' is .* but 'video_path'"),
  ({"videos": ["a.mp4", "b.mp4"]}, "2 videos, 1 expected"),
  ({"videos": {"a": 1}}, "'videos' must be a path"),
  ({"images": [{"path": "a"}]}, "'images' must be a path"),
  ({"images": [3]}, "'images' must be a path"),
  ({"video": "a.mp4", "audio": "a.wav"}, "is not listened to"),
]


@pytest.mark.parametrize("given, message", BAD)
def test_media_that_are_not_plain(given, message):
  with pytest.raises(UserError, match=message):
    _parse(**given)
