"""Pair shards and the funnel, as a Ray job.

ray job submit --working-dir . -- python jobs/pair.py RECIPE [--set key=value …]
"""

from deltaray.cli.submit.script import run_script

run_script("pair")
