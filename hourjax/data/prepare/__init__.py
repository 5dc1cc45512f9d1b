"""From downloaded files to one prepared dataset."""
