"""Construction of the dataset: videos to questions, by models at endpoints."""
