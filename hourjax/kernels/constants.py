"""Constants that several implementations of attention share."""

LANES = 128  # numbers in one row of a TPU's vector register

# The log-sum-exp of a query that sees no key has two values. As one part of a
# memory it must weigh nothing when parts are merged: exp(NO_PART - lse) is 0.
# As the whole it must make all weights zero in the backward pass, where they
# are exp(score - lse): exp(score - NO_KEYS) is 0. Both are finite, so that
# differences between them are numbers and never NaN.
NO_PART = -1e30
NO_KEYS = 1e30

# Names under which rematerialisation keeps each attention's output and
# log-sum-exp, so that the backward pass never repeats the sweep over the keys.
SAVED = ("attention_out", "attention_lse")
