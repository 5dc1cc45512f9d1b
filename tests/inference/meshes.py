"""Answers on the virtual devices of this process.

  python -m tests.inference.meshes '[{"seq": 4}, ...]'

prints, for each mesh, the answers, the next turn's, logits after the prompts,
and attention by second, as JSON.
"""

import json
import os
import pathlib
import sys
import tempfile

from tests.xla_flags import xla_flags

if __name__ == "__main__":
  os.environ["XLA_FLAGS"] = xla_flags(4)

import jax

from hourjax.data.records.record import Turn
from hourjax.parallel.mesh import MeshConfig
from tests.inference import models

jax.config.update("jax_numpy_rank_promotion", "raise")


def run(mesh: dict, folder: pathlib.Path) -> dict:
  """Answers the questions on a mesh."""
  model = models.tiny(folder, MeshConfig(fsdp=1, **mesh))
  memory = model.encode_memory(models.features())
  # Each of these tokens leads by 0.05 or more, and meshes round logits apart
  # by 0.001. A seventh token would lead by 0.004.
  answers = memory.answer(models.QUESTIONS, max_tokens=6)
  layouts = [
    models.layout_of(memory, [Turn("human", question)])
    for question in models.QUESTIONS
  ]
  state = memory._answering.prefill(layouts, 1)
  session = memory.chat()
  attention = session.ask(models.QUESTIONS[1], max_tokens=4).attention
  after = session.ask(models.QUESTIONS[2], max_tokens=8)
  return {
    "answers": [answer.text for answer in answers],
    "after": after.text,
    "logits": models.next_logits(model, state)[:3].tolist(),
    "attention": attention.attention.tolist(),
    "text": model.empty_memory().ask("Who?", max_tokens=8).text,
  }


if __name__ == "__main__":
  assert len(jax.devices()) == 4
  with tempfile.TemporaryDirectory() as made:
    cases = json.loads(sys.argv[1])
    print(json.dumps([run(case, pathlib.Path(made)) for case in cases]))
