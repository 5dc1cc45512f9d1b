"""One's own videos and questions to an adapted model and a report."""
