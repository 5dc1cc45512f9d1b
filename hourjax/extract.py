"""Extracts features of videos into a feature store.

  python -m hourjax.extract --config=configs/hourllava.py:size=3b,stage=3 \
      --tower=siglip-so400m-patch14-384 \
      --videos=videomarathon/videos --out=gs://bucket/features

The tower is read from a SigLIP folder, an Hour-LLaVA checkpoint, a workdir or
hf://ORGANISATION/NAME; by default it is the one that training with this
configuration starts from. Stored videos are skipped, so a stopped run can be
started again. A damaged video is stored if --min_share of its frames can be
read; the index then holds the fraction. Several machines share the work by
JAX's process index, by --worker=0/8 and so on, or by --beam_runner.

Ends with 0 if every video is stored, 3 if some failed (see failures-*.jsonl in
the store), 2 on a mistake in the options, 1 if it could not go on (full disk),
130 on interrupt and 143 on SIGTERM.
"""

import signal
import sys

from absl import flags
from ml_collections import config_flags

from hourjax import command, progress
from hourjax.data.media.video import MIN_SHARE
from hourjax.data.records.record import Skipped
from hourjax.extraction import beam
from hourjax.extraction.encoder import tower_params
from hourjax.extraction.video_list import parse_worker
from hourjax.extraction.worker import extract_videos
from hourjax.training.config import Experiment, build_experiment

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_VIDEOS = flags.DEFINE_string("videos", None, "Folder of videos.")
_OUT = flags.DEFINE_string("out", None, "Feature store: a folder or URL.")
_TOWER = flags.DEFINE_string("tower", None, "Folder with the tower's weights.")
_NAMES = flags.DEFINE_string("names", None, "File of names; only these videos.")
_THREADS = flags.DEFINE_integer(
  "threads", None, "Videos decoded at a time (one a core).", 1, 4096
)
_WORKER = flags.DEFINE_string(
  "worker", None, "Index and count of workers, i/n."
)
_FRAMES = flags.DEFINE_integer(
  "batch_frames", None, "Frames encoded at a time (32 a device).", lower_bound=1
)
_SHARE = flags.DEFINE_float(
  "min_share", MIN_SHARE, "Fraction of frames that must be read.", 0, 1
)
_RUNNER = flags.DEFINE_string("beam_runner", None, "E.g. DirectRunner.")
_OPTIONS = flags.DEFINE_string(
  "beam_options", "", "Options of the runner, separated by spaces."
)


def main(_: list[str]) -> None:
  """Runs the command."""
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  experiment = build_experiment(_CONFIG.value.to_dict())
  sys.exit(3 if _extract(experiment) else 0)


def _extract(experiment: Experiment) -> list[Skipped]:
  """Extracts as the options say, and returns the videos that failed."""
  if not (_TOWER.value or experiment.init):
    print(
      "the tower is drawn at random, as training draws it; for published"
      " weights give --tower",
      flush=True,
    )
  videos, out = command.given(_VIDEOS), command.given(_OUT)
  frames, share, tower = _FRAMES.value, _SHARE.value, _TOWER.value
  if _RUNNER.value:
    job = beam.ExtractionJob(experiment, tower, videos, out, frames, share)
    return beam.extract_videos(
      job, runner=_RUNNER.value, options=_OPTIONS.value, names=_NAMES.value
    )
  with progress.step("reading the tower"):
    params = tower_params(experiment, tower)
  return extract_videos(
    params,
    experiment.model,
    videos=videos,
    out=out,
    batch_frames=frames,
    threads=_THREADS.value,
    worker=parse_worker(_WORKER.value) if _WORKER.value else None,
    names=_NAMES.value,
    min_share=share,
  )


if __name__ == "__main__":
  command.run(
    main,
    required=["config", "videos", "out"],
    resume="what is stored so far counts, make room and start again",
    writes="out",
  )
