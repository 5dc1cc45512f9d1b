"""The run-time type checker of the tests; imports nothing of hourjax."""

from beartype import BeartypeConf, beartype

# An int may stand where a float is asked for (PEP 484).
typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
