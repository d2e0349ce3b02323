"""Scores of all responses, as a Ray job.

ray job submit --working-dir . -- python jobs/score.py RECIPE [--set key=value …]
"""

from deltaray.cli.submit.script import run_script

run_script("score")
