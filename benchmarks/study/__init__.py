"""Tasks, clips and statistics of `which_clip.py`."""
