"""What hourjax_tiny.yaml needs in code. lmms_eval runs this; no tests here."""

from PIL import Image


def visuals(doc):
  if doc["video"]:
    return [doc["video"]]
  return [Image.open(doc["image"])] if doc["image"] else []


def score(doc, results):
  return {"right": float(results[0] == doc["answer"])}
