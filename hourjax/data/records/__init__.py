"""Records: one question set about a video, images or nothing."""
