"""Parts of launch/tpu_vm.py; the standard library only, Python 3.9 or newer."""
