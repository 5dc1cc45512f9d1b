"""launch/construct.sh, with a stand-in for vLLM."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests.construction import demo_videos, stand_in_vllm

ROOT = demo_videos.ROOT
pytestmark = pytest.mark.skipif(
  not (ROOT / ".venv" / ".installed-construct").exists(),
  reason="launch/test.sh has not installed the extra `construct`",
)


def _run(folder, *arguments, **environment):
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  vllm = folder / "vllm"
  python = f"PYTHONPATH={ROOT} exec {sys.executable}"
  vllm.write_text(
    f'#!/bin/sh\n{python} -m tests.construction.stand_in_vllm "$@"\n'
  )
  vllm.chmod(0o755)
  return subprocess.run(
    ["bash", str(ROOT / "launch" / "construct.sh"), *map(str, arguments)],
    cwd=folder,
    env={
      **os.environ,
      "VLLM": str(vllm),
      "PORT": f"{port}",
      "STAND_IN_ENDED": str(folder / "ended"),
      **environment,
    },
    capture_output=True,
    text=True,
    timeout=200,
  )


@pytest.mark.slow
def test_a_server_and_a_construction(tmp_path):
  videos = tmp_path / "videos"
  demo_videos.write_videos(videos, stand_in_vllm.VIDEOS)
  done = _run(tmp_path, videos, tmp_path / "out", "--count=1")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "2 of 2 videos" in done.stdout
  assert (tmp_path / "out" / "videomarathon.json").stat().st_size > 1000
  assert (tmp_path / "ended").exists()  # it was stopped, and not killed


def test_a_server_that_ends(tmp_path):
  done = _run(tmp_path, tmp_path, tmp_path / "out", MODEL="broken")
  assert done.returncode == 1
  assert "error: the server has ended" in done.stderr
  assert "CUDA out of memory" in done.stderr


def test_usage(tmp_path):
  done = _run(tmp_path, pathlib.Path("videos"))
  assert done.returncode == 2 and "usage:" in done.stderr
