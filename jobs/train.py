"""Reference log-probs and the students, as a Ray job.

ray job submit --working-dir . -- python jobs/train.py RECIPE [--set key=value …]
"""

from deltaray.cli.submit.script import run_script

run_script("train")
