import itertools

import pytest

from hourjax.errors import UserError
from hourjax.extraction.video_list import (
  find_videos,
  parse_worker,
  worker_slice,
)


def _touch(folder, *names):
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()


def test_names_are_sorted_relative_paths(tmp_path):
  _touch(tmp_path, "b.mp4", "a/z.MKV", "a/c d é.webm", "a.txt", ".x.mp4")
  _touch(tmp_path, ".hidden/y.mp4", "a.d/1.mov")
  expected = ["a.d/1.mov", "a/c d é.webm", "a/z.MKV", "b.mp4"]
  assert find_videos(tmp_path) == expected


def test_linked_folders_are_followed_once(tmp_path):
  _touch(tmp_path / "disk", "1.mp4")
  _touch(tmp_path / "root", "2.mp4")
  (tmp_path / "root" / "linked").symlink_to(tmp_path / "disk")
  (tmp_path / "disk" / "back").symlink_to(tmp_path / "root")
  assert find_videos(tmp_path / "root") == ["2.mp4", "linked/1.mp4"]


def test_a_link_beside_its_folder_renames_nothing(tmp_path):
  _touch(tmp_path / "panda", "x.mp4")
  (tmp_path / "latest").symlink_to(tmp_path / "panda")
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "again").symlink_to(tmp_path / "panda")
  assert find_videos(tmp_path) == ["panda/x.mp4"]


def test_a_list_of_names(tmp_path):
  names = tmp_path / "names.txt"
  names.write_text("b.mp4\n\na/ c.mp4\nb.mp4\n", encoding="utf-8")
  assert find_videos(tmp_path, names) == ["a/ c.mp4", "b.mp4"]


@pytest.mark.parametrize("name", ["../x.mp4", "/etc/x.mp4", "a/../../x.mp4"])
def test_names_outside_the_folder(tmp_path, name):
  names = tmp_path / "names.txt"
  names.write_text(f"a.mp4\n{name}\n")
  with pytest.raises(UserError, match="give paths below the folder of videos"):
    find_videos(tmp_path, names)


def test_nothing_to_do(tmp_path):
  (tmp_path / "empty.txt").touch()
  for names in (None, tmp_path / "empty.txt"):
    with pytest.raises(UserError, match="holds no video"):
      find_videos(tmp_path, names)
  with pytest.raises(UserError, match="cannot read the names in"):
    find_videos(tmp_path, tmp_path / "none.txt")
  for root in (tmp_path / "none", "gs://bucket/videos"):
    with pytest.raises(UserError, match="is not a folder on this machine"):
      find_videos(root)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_slices_are_disjoint_and_whole(count):
  names = [f"{i}" for i in range(17)]
  slices = [worker_slice(names, i, count) for i in range(count)]
  assert sorted(itertools.chain(*slices)) == sorted(names)
  assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_parse_worker():
  assert parse_worker("2/8") == (2, 8)
  for text in ("", "2", "2/", "/8", "-1/8", "a/b", "1/2/3", "0/0"):
    with pytest.raises(UserError, match="write index/count"):
      parse_worker(text)
  with pytest.raises(UserError, match="worker 8 of 8; the first is 0"):
    parse_worker("8/8")


def test_an_empty_name_is_no_folder(tmp_path, monkeypatch):
  """As of an empty shell variable; not the working directory."""
  _touch(tmp_path, "a.mp4")
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="folder of videos is empty"):
    find_videos("")


def test_what_is_left_out_is_said(tmp_path, capsys):
  _touch(tmp_path, "a.MTS", "b.m2ts", "c.vob", "d.asf", "e.gif", "f.mp4")
  assert len(find_videos(tmp_path)) == 6
  assert capsys.readouterr().out == ""
  _touch(tmp_path, "a.txt", "b.TXT", "sub/c.part", "README", ".hidden.txt")
  assert len(find_videos(tmp_path)) == 6
  (line,) = capsys.readouterr().out.splitlines()
  assert line == (
    "left out for their endings: 4 files (.txt 2, none 1, .part 1)"
  )


def test_links_that_leave_the_folder_are_said(tmp_path, capsys):
  root = tmp_path / "root"
  _touch(tmp_path, "disk/1.mp4", "disk/2.mp4", "x.mp4", "root/in/3.mp4")
  (root / "linked").symlink_to(tmp_path / "disk")
  (root / "4.mp4").symlink_to(tmp_path / "x.mp4")
  (root / "5.mp4").symlink_to(root / "in" / "3.mp4")
  (root / "up").symlink_to(tmp_path)
  names = ["4.mp4", "5.mp4", "in/3.mp4", "linked/1.mp4", "linked/2.mp4"]
  assert find_videos(root) == names
  outside, above = capsys.readouterr().out.splitlines()
  assert outside.startswith(f"3 of 5 videos lie outside of {root}, behind")
  assert f"{root}/linked -> {tmp_path}/disk" in outside
  assert f"{root}/4.mp4 -> {tmp_path}/x.mp4" in outside
  assert above.startswith("1 links to folders that hold") and "/up" in above


def test_folders_of_frames_are_named(tmp_path, capsys):
  _touch(tmp_path, "a.mp4", "b/1.jpg", "b/2.jpg")
  assert find_videos(tmp_path) == ["a.mp4"]
  assert "(.jpg 2); name folders of frames with" in capsys.readouterr().out
  (tmp_path / "names.txt").write_text("b\n")
  assert find_videos(tmp_path, tmp_path / "names.txt") == ["b"]
