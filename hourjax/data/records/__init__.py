"""Records: conversations about a video, images or nothing."""
