"""The merges of a recipe's adapters, as a Ray job.

ray job submit --working-dir . -- python jobs/merge.py RECIPE [--set key=value …]
"""

from deltaray.cli.submit.script import run_script

run_script("merge")
