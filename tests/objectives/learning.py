"""Do rewards raise accuracy, and do preferences end a habit?

  python -m tests.objectives.learning grpo WORK OUT --init=WORK/memaug --seed=0
  python -m tests.objectives.learning dpo WORK OUT --init=WORK/memaug --seed=0

WORK is the folder that launch/local.sh has filled, --init one of its stages.

grpo: questions of the demo get four options. A stage is fine-tuned on some of
them for a few steps, and then rewarded for right answers to others; both answer
the questions about the test videos.

dpo: a stage is fine-tuned on answers of which most end with needless words;
then answers without them are preferred to answers with them.

Every part that is finished is kept, and the last line is a JSON object.
"""

import argparse
import collections
import json
import pathlib
import random
import subprocess
import sys

import hourjax
from hourjax.data.records.record import parse_record
from hourjax.data.store.features import FeatureStore
from hourjax.evaluation.benchmarks.record_questions import last_question
from hourjax.evaluation.parsing import parse
from hourjax.evaluation.scoring import is_right, wilson

HABIT = " in the video"
MARKER = "<image>\n"


def _singles(path):
  """Yields (record, question, answer, facts), one question each."""
  for record in json.loads(path.read_text()):
    turns = record["conversations"]
    for number, facts in enumerate(record["questions"]):
      question, answer = (
        t["value"] for t in turns[2 * number : 2 * number + 2]
      )
      yield record, question.replace(MARKER, ""), answer, facts


def _kind(question, facts):
  """What questions have the same set of answers."""
  return (facts["task"], *question.split()[:2])


def _record(record, number, question, answer, **extra):
  return {
    "id": f"{record['id']}.{number}",
    "video": record["video"],
    "duration": record["duration"],
    "conversations": [
      {"from": "human", "value": MARKER + question},
      {"from": "gpt", "value": answer, **extra},
    ],
  }


def choice_records(path, pools, seed):
  """Makes questions of one word's answer multiple-choice ones.

  The answer is the option's text, which a model of this size learns sooner than
  its letter; the parser reads it as that option. For the same reason the
  options stand before the question.
  """
  rng, made = random.Random(seed), []
  for number, (record, question, answer, facts) in enumerate(_singles(path)):
    pool = pools.get(_kind(question, facts), ())
    if facts["needle"] or len(pool) < 4 or answer not in pool:
      continue
    options = [answer, *rng.sample(sorted(pool - {answer}), 3)]
    rng.shuffle(options)
    listed = " ".join(f"{x}. {o}" for x, o in zip("ABCD", options))
    asked = _record(record, number, f"{listed}\n{question}", answer)
    letter = "ABCD"[options.index(answer)]
    asked["questions"] = [{**facts, "letter": letter, "options": options}]
    made.append(asked)
  return made


def answer_pools(path):
  """Returns the answers of one word by kind of question."""
  found = collections.defaultdict(collections.Counter)
  for _, question, answer, facts in _singles(path):
    if facts["letter"] is None:
      found[_kind(question, facts)][answer] += 1
  return {
    kind: set(counts)
    for kind, counts in found.items()
    if len(counts) <= 8 and not any(" " in answer for answer in counts)
  }


def habit_records(path, seed, share):
  """Returns records of which a share ends with the habit, and their pairs."""
  rng, made, pairs = random.Random(seed), [], []
  for number, (record, question, answer, facts) in enumerate(_singles(path)):
    if facts["needle"] or facts["letter"] is not None:
      continue
    said = answer + (HABIT if rng.random() < share else "")
    made.append(_record(record, number, question, said))
    pairs.append(
      _record(record, number, question, answer, rejected=answer + HABIT)
    )
  return made, pairs


def _run(*arguments):
  print("$ python -m", *arguments, flush=True)
  subprocess.run([sys.executable, "-m", *arguments], check=True)


def prepare(work, folder, records):
  """Prepares records; returns the dataset's folder."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  path = folder.with_suffix(".json")
  path.write_text(json.dumps(records))
  if not folder.is_dir():
    _run(
      "hourjax.prepare", f"--records={path}", f"--out={folder}",
      f"--tokenizer={work}/data/tokenizer", f"--features={work}/data/features",
    )  # fmt: skip
  return folder


def train(args, name, dataset, init, objective, *more):
  """Trains a part, or goes on with it; returns its workdir."""
  folder = args.out / name
  config = f"configs/demo.py:data={args.work}/data,stage={args.stage}"
  _run(
    "hourjax.train", f"--config={config},objective={objective}",
    f"--workdir={folder}", f"--config.data.dataset={dataset}",
    f"--config.init={init}", f"--config.seed={args.seed}", *more,
  )  # fmt: skip
  return folder


def _tuned(args, steps):
  """Options of the fine-tuning before: rows of one question each."""
  return (
    f"--config.steps={steps}", "--config.batch_rows=48",
    f"--config.checkpoint_every={steps}", "--config.draw_missing=",
    "--config.optimizer.name=adamw", "--config.optimizer.projector=0",
    f"--config.optimizer.decoder={args.tune_rate}",
    f"--config.optimizer.memaug={args.tune_rate}",
  )  # fmt: skip


def answers(args, folder, records):
  """Returns (question, answer) of a workdir's model to records."""
  known = folder / f"answers-{len(records)}.json"
  asked = [last_question(parse_record(r, r["id"])) for r in records]
  if known.exists():
    return list(zip(asked, json.loads(known.read_text())))
  model = hourjax.load(folder)
  store = FeatureStore(f"{args.work}/data/features")
  said = {}
  by_video = collections.defaultdict(list)
  for question in asked:
    by_video[question.video].append(question)
  for video, questions in by_video.items():
    memory = model.encode_stored_memory(store, video)
    found = memory.answer([q.prompt for q in questions], max_tokens=8)
    said |= {q.id: a.text for q, a in zip(questions, found)}
  texts = [said[question.id] for question in asked]
  known.write_text(json.dumps(texts))
  return list(zip(asked, texts))


def _share(flags):
  low, high = wilson(sum(flags), len(flags))
  return {
    "share": sum(flags) / len(flags), "low": low, "high": high, "n": len(flags)
  }  # fmt: skip


def right(found):
  """Returns the share of right answers with its interval."""
  return _share([is_right(parse(text, q), q) for q, text in found])


def main():
  """Runs one of both."""
  parser = argparse.ArgumentParser()
  parser.add_argument("what", choices=("grpo", "dpo"))
  parser.add_argument("work", type=pathlib.Path)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--init", required=True)
  parser.add_argument("--stage", type=int, default=3)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--tune_steps", type=int, default=60)
  parser.add_argument("--tune_rate", type=float, default=3e-4)
  parser.add_argument("--steps", type=int, default=0)
  parser.add_argument("--rate", type=float, default=0)
  parser.add_argument("--tuned", type=int, default=6000)
  parser.add_argument("--learnt", type=int, default=6000)
  parser.add_argument("--questions", type=int, default=400)
  args = parser.parse_args()
  # A stage knows the questions that it was trained on.
  names = "lookups" if args.stage == 1 else "train", "test"
  train_path, test_path = (args.work / "data" / f"{x}.json" for x in names)
  more = [f"--config.steps={args.steps}"] if args.steps else []
  if args.rate:
    more += [
      f"--config.optimizer.{part}={args.rate}" for part in ("decoder", "memaug")
    ]
  rng = random.Random(args.seed)
  data = args.out / f"data{args.seed}"
  if args.what == "grpo":
    pools = answer_pools(train_path)
    made = choice_records(train_path, pools, args.seed)
    rng.shuffle(made)
    # The test is the same for all seeds.
    test = choice_records(test_path, pools, 0)
    random.Random(0).shuffle(test)
    test = test[: args.questions]
    first = prepare(args.work, data / "tune", made[: args.tuned])
    second = prepare(
      args.work, data / "rewarded", made[args.tuned :][: args.learnt]
    )
    tuned = train(
      args, f"sft{args.seed}", first, args.init, "sft",
      *_tuned(args, args.tune_steps),
    )  # fmt: skip
    done = train(args, f"grpo{args.seed}", second, tuned, "grpo", *more)
    before, after = (right(answers(args, x, test)) for x in (tuned, done))
    result = {"accuracy before": before, "accuracy after": after}
  else:
    made, pairs = habit_records(train_path, args.seed, 0.7)
    rng.shuffle(made)
    rng.shuffle(pairs)
    test, _ = habit_records(test_path, 0, 0.0)
    random.Random(0).shuffle(test)
    test = test[: args.questions]
    first = prepare(args.work, data / "habit", made[: args.tuned])
    second = prepare(args.work, data / "pairs", pairs[: args.learnt])
    tuned = train(
      args, f"habit{args.seed}", first, args.init, "sft",
      *_tuned(args, args.tune_steps),
    )  # fmt: skip
    done = train(args, f"dpo{args.seed}", second, tuned, "dpo", *more)
    result = {}
    for name, folder in (("before", tuned), ("after", done)):
      found = answers(args, folder, test)
      result[f"habit {name}"] = _share([t.endswith(HABIT) for _, t in found])
      result[f"accuracy {name}, without the habit"] = right(
        [(q, t.removesuffix(HABIT)) for q, t in found]
      )
  print(json.dumps({"seed": args.seed, **result}))


if __name__ == "__main__":
  main()
