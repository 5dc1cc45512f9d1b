"""The Hour-LLaVA model in Flax NNX: arrays in, arrays out."""
