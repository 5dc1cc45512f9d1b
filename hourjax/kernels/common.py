"""Constants that the backends share."""

LANES = 128  # of a TPU's vector registers

# Log-sum-exp of a query that sees no key: as a part of a memory it weighs
# nothing, as the whole it makes all weights zero. Finite, so that differences
# are numbers.
NO_PART = -1e30
NO_KEYS = 1e30

# Under these names rematerialisation keeps each attention's output and
# log-sum-exp, so that the backward pass never repeats the sweep.
SAVED = ("attention_out", "attention_lse")
