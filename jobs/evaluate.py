"""Benchmarks of the students and the teachers, as a Ray job.

ray job submit --working-dir . -- python jobs/evaluate.py RECIPE [--set key=value …]
"""

from deltaray.cli.submit.script import run_script

run_script("evaluate")
