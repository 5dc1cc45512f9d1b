"""Mistakes in what is asked that show before a model is loaded."""

import os
from collections.abc import Sequence

from hourjax.errors import UserError
from hourjax.inference.picture import check_picture
from hourjax.inference.sampling import Sampling


def image_paths(values: Sequence[str]) -> list[str]:
  """The files that --images names: one, or several with commas between.

  A comma may be part of a name: it is where a file of the longer name exists.

    a.jpg,b.jpg      a.jpg and b.jpg
    a,b.jpg,c.jpg    a,b.jpg and c.jpg, if there is a file "a,b.jpg"

  Args:
    values: as given, one for each time that the option is.
  """
  paths = []
  for value in values:
    parts = value.split(",")
    while parts:
      sizes = range(len(parts), 0, -1)
      names = {size: ",".join(parts[:size]).strip() for size in sizes}
      size = next((n for n in sizes if os.path.isfile(names[n])), 1)
      paths.append(names[size])
      parts = parts[size:]
  return paths


def check_options(
  questions: Sequence[str],
  *,
  video: str | None,
  features: str | None,
  images: Sequence[str],
  duration: float | None,
  sampling: Sampling,
  picture: str,
) -> None:
  """Checks the options of `python -m hourjax.ask`.

  Args:
    questions: what stands behind the options: one, or none.
    video, features, images: to ask about; one of them is given.
    duration: of the features.
    sampling: how tokens are chosen.
    picture: file to be written, "" for none.

  Raises:
    UserError: naming the option and what it should be.
  """
  if len(questions) > 1:
    raise UserError(
      f"{len(questions)} arguments, {questions[0]!r} and more; put the question"
      " in quotes, options start with --"
    )
  if questions and not questions[0].strip():
    raise UserError("the question is empty; ask something")
  if sum(map(bool, (video, features, images))) != 1:
    raise UserError("give one of --video, --features and --images")
  if video and video.endswith(".npy"):
    raise UserError(f"--video={video} is no video; features are --features")
  if features and not features.endswith(".npy"):
    raise UserError(
      f"--features={features} is no .npy file; a video is --video"
    )
  if not all(images):
    raise UserError(
      f"--images={','.join(images)} has an image without a name; write"
      " --images=a.jpg,b.jpg"
    )
  if duration is not None and not features:
    raise UserError("--duration is of --features; a video knows its own")
  if sampling.top_p != 1 and not sampling.temperature:
    raise UserError(
      f"--top_p={sampling.top_p} is of draws, and --temperature=0 draws"
      " nothing; give a --temperature or leave --top_p out"
    )
  if picture and images:
    raise UserError(
      "--picture shows where in a video the model looked; leave it out with"
      " --images"
    )
  if picture:
    check_picture(picture)
