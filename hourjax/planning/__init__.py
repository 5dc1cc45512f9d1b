"""What a training run takes of a pod, before it is rented."""
