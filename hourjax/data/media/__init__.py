"""Video and image files: which frames are read, and their pixels."""
