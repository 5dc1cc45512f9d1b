"""The plan command with a compiler whose device holds 1,024 rows at most."""

from hourjax import command, plan
from hourjax.planning import fit, search
from hourjax.planning import plan as planning
from hourjax.planning.compiler.compiled_step import Compiled


def compile_step(experiment, topology, workload, *, limit, whole=False):
  assert limit == 9
  if experiment.batch_rows > 1024:
    return Compiled(None, "accumulate: RESOURCE_EXHAUSTED", 16 << 30)
  counted = search.count_parameters(experiment)
  answer = search.formulas(experiment, topology, counted)
  answer["programs"]["accumulate"]["temporaries"] = 0
  return Compiled(answer)


if __name__ == "__main__":
  planning.compile_step = fit.compile_step = compile_step
  command.run(plan.main)
