"""From videos to features and from questions to answers."""
