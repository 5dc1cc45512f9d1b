"""A worker process that ends as its task says."""

import json
import os
import sys
import time

TASK = json.load(sys.stdin)
if TASK == "abort":
  print("F0101 topology.cc:1] Check failed: 32 <= 16", file=sys.stderr)
  os.abort()
if TASK == "raise":
  raise ValueError("the compiler's reason")
if TASK == "sleep":
  time.sleep(60)
if TASK == "cache":
  import jax

  print(json.dumps(jax.config.jax_enable_compilation_cache))
  sys.exit()
print("something else")
names = ("LIBTPU_INIT_ARGS", "JAX_ENABLE_COMPILATION_CACHE", "XLA_FLAGS")
print(json.dumps({"task": TASK, **{name: os.environ[name] for name in names}}))
