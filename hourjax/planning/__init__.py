"""Memory, time and cost of training on a pod, before it is rented."""
